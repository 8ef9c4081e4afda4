"""Kernels that start before their predecessor ends wait before they read what it writes: see ``early_start.py``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("early_start.py")
CASES = ["attend:256,tq2,tcq2.5", "attend:64,tcq3,tq4", "attend:128,q8_0,tcq2", "merge", "finish"]


@pytest.mark.parametrize("case", CASES)
def test_no_load_or_store_comes_too_early(case: str, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), case], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "waits in time", done.stderr[-2000:]
