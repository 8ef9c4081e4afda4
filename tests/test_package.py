"""What is installed is what is needed: files that are no Python code are packaged too."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOT_DATA = (".py", ".pyc", ".so", ".md")  # code, what is built from it, and notes for who changes it


def test_every_file_beside_the_code_is_package_data() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["turbomoe"]
    package = ROOT / "turbomoe"
    packaged = {path for pattern in patterns for path in package.glob(pattern)}
    beside = {path for path in package.rglob("*") if path.is_file() and path.suffix not in NOT_DATA}
    assert beside - packaged == set()
    assert {"pool.c", "kernels.h"} <= {path.name for path in packaged}
