"""The C core for the tests: built once from the sources as they are; skipped, with the reason, without a compiler."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from turbomoe.native.build import BuildError, ensure_built
from turbomoe.native.library import LEVELS, Core
from turbomoe.native.pool import WorkerPool


@pytest.fixture(scope="session")
def core() -> Core:
    if special := os.environ.get("TURBOMOE_TEST_CORE"):  # a sanitized or emulated build
        return Core(Path(special))
    try:
        return Core(ensure_built(extra=["-Werror"]))
    except BuildError as error:
        if "No C compiler" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="session")
def pool(core: Core) -> WorkerPool:
    return WorkerPool(core, threads=3, hot_us=200)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, core: Core) -> Iterator[str]:
    """Every dispatch level that this processor runs, forced."""
    if request.param not in core.levels():
        pytest.skip(f"this processor has no {request.param}")
    core.force_level(request.param)
    yield request.param
    core.force_level("auto")
