"""Every test starts from the same place: own state folder, fixed seeds, one thread, no way to a model hub."""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# At import, before any test module brings in torch, transformers or huggingface_hub: they read these once.
_HOME = tempfile.TemporaryDirectory(prefix="turbomoe-test-home-")
os.environ["TURBOMOE_HOME"] = str(Path(_HOME.name) / "state")
os.environ["HF_HOME"] = str(Path(_HOME.name) / "hf")
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # the discard port: a test that reaches out fails at once
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when a kernel is defined; here no test has a GPU

# A shell's background job starts with Ctrl-C ignored, and its children inherit that: tests of Ctrl-C could not work.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", deadline=None, max_examples=2000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed what is already imported; a test that never touches torch should not pay for it."""
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
        torch.set_num_threads(1)


@pytest.fixture
def state_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder of this test alone (the default one is shared by the tests of one process)."""
    home = tmp_path / "state"
    monkeypatch.setenv("TURBOMOE_HOME", str(home))
    return home
