"""Without a core, or a compiler, everything still works, slower, and says so in one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.native.support import random_experts, random_matrix, random_routing, relative_error
from turbomoe.native import build, kernels, library
from turbomoe.native.kernels import ExpertsKernel, LinearKernel
from turbomoe.native.library import Core, NativeError
from turbomoe.native.pool import WorkerPool
from turbomoe.notices import NoticeBoard


@pytest.fixture
def no_core(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> NoticeBoard:
    """A package without a built library, and a fresh notice board."""
    board = NoticeBoard()
    monkeypatch.setattr(library, "board", board)
    monkeypatch.setattr(library, "_places", lambda: [tmp_path / library.LIBRARY_NAME])
    monkeypatch.setattr(library, "_opened", [])
    return board


def test_the_reference_runs_and_says_so(no_core: NoticeBoard, capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.open_pool() is None
    assert kernels.open_pool() is None
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "plain PyTorch" in line and "python -m turbomoe.native.build" in line
    assert len(no_core.counts) == 1
    assert library.describe_core().startswith("plain PyTorch, tens of times slower: the compiled core is not there")


def test_a_stale_core_is_not_used(no_core: NoticeBoard, tmp_path: Path) -> None:
    (tmp_path / library.LIBRARY_NAME).write_bytes(b"built from other sources")
    assert kernels.open_pool() is None
    assert "older than its sources" in library.describe_core()


def test_a_core_built_later_is_found(no_core: NoticeBoard, core: Core, tmp_path: Path) -> None:
    """In the same process: None is not remembered. Once opened it stays, whatever becomes of the file."""
    assert library.load_core() is None
    shutil.copy(core.path, tmp_path / library.LIBRARY_NAME)
    found = library.load_core()
    assert found is not None and found.path == tmp_path / library.LIBRARY_NAME
    (tmp_path / library.LIBRARY_NAME).unlink()
    assert library.load_core() is found


def test_kernels_without_a_core_give_the_same_results(pool: WorkerPool) -> None:
    """To the rounding of activations, which the reference does not round: within 2%."""
    rng = np.random.default_rng(0)
    layer = random_experts(rng, 4, 64, 96, dict.fromkeys(("gate", "up", "down"), "Q8_0"))
    hidden, (ids, weights) = torch.randn(5, 64), random_routing(rng, 4, 5, 2, skipped=0.2)
    matrix, y, z = random_matrix(rng, "Q4_1", 40, 64, bias=True), torch.empty(5, 40), torch.empty(5, 40)
    outs = []
    for which in (None, pool):
        kernel = ExpertsKernel(which, hidden=64, width=96, experts=4, top=2, rows=5)
        outs.append(torch.empty(5, 64))
        kernel.run(layer, hidden, ids, weights, outs[-1])
        LinearKernel(which, cols=64, tokens=5).run([matrix], hidden, [y if which is None else z])
        with pytest.raises(NativeError, match="expert id"):
            kernel.run(layer, hidden, ids + 4, weights, outs[-1].clone())
    assert relative_error(outs[1], outs[0]) < 0.02 and relative_error(z, y) < 0.02


def test_no_compiler_is_one_clear_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(build.BuildError, match=r"No C compiler was found.*install gcc or clang"):
        build.build(tmp_path / "core.so")
    monkeypatch.setattr("sys.argv", ["build", "--output", str(tmp_path / "core.so")])
    assert build.main() == 1
    assert capsys.readouterr().err.startswith("No C compiler was found.")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_a_broken_source_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "src"
    source.mkdir()
    (source / "broken.c").write_text("int f(void) { return }\n")
    monkeypatch.setattr(build, "SOURCE_DIR", source)
    with pytest.raises(build.BuildError, match="does not build") as caught:
        build.build(tmp_path / "out" / "core.so")
    assert "broken.c" in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_library_of_another_interface_is_refused(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "ABI_VERSION", 99)
    with pytest.raises(NativeError, match="does not fit this package"):
        Core(core.path)


def test_built_once(core: Core) -> None:
    before = core.path.stat().st_mtime_ns
    assert build.ensure_built(core.path).stat().st_mtime_ns == before
    assert build.is_current(core.path)
