"""The compiled trellis encoder against the search in PyTorch: the same bits at every level."""

from __future__ import annotations

import ctypes
import itertools
import math

import pytest
import torch

from tests.kv.test_codecs import finite_vectors
from turbomoe.kv.codecs import make_codec
from turbomoe.kv.codecs.trellis import TrellisCodec
from turbomoe.kv.trellis_codebook import TRELLISES
from turbomoe.native import trellis as native
from turbomoe.native.library import Core, CTrellis, NativeError
from turbomoe.native.pool import WorkerPool
from turbomoe.native.trellis import KINDS


def assert_same(core: Core, name: str, x: torch.Tensor) -> None:
    codec = make_codec(name, x.shape[-1])
    assert isinstance(codec, TrellisCodec)
    (codes, scales), (want_codes, want_scales) = codec.encode_natively(core, x), codec.encode_plainly(x)
    assert torch.equal(codes, want_codes)
    assert torch.equal(scales.nan_to_num(-1.0), want_scales.nan_to_num(-1.0))  # a NaN's sign is its own


@pytest.mark.parametrize(("name", "dim"), list(itertools.product(TRELLISES, [32, 64, 128, 256, 512])))
def test_gaussian_vectors_of_any_size(core: Core, level: str, name: str, dim: int) -> None:
    assert_same(core, name, torch.randn(60, dim) * torch.logspace(-5, 5, 60)[:, None])


@pytest.mark.parametrize("name", TRELLISES)
def test_vectors_that_nobody_wants(core: Core, level: str, name: str) -> None:
    """Ties, zeros, spikes, denormals, infinities, NaN: also what cannot be told apart but by the order of states."""
    x = finite_vectors(300)
    x[1::10, 5], x[2::10, 63] = math.nan, -math.inf
    x[3] = 1.0
    x[4] = torch.arange(64) % 2 * 2.0 - 1
    x[5] = torch.nn.functional.one_hot(torch.tensor(9), 64) * 7.0
    assert_same(core, name, x)


@pytest.mark.parametrize("name", TRELLISES)
def test_many_threads_encode_what_one_does(
    core: Core, pool: WorkerPool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec, x = make_codec(name, 64), torch.randn(7, 5, 11, 64).transpose(0, 1)
    assert isinstance(codec, TrellisCodec)
    found = []
    for opened in (None, pool):
        monkeypatch.setattr(native, "opened_pool", lambda opened=opened: opened)
        found.append(codec.encode_natively(core, x))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("kind", "dim"), [(-1, 64), (len(KINDS), 64), (0, 16), (0, 96), (0, 1024), (0, -64)])
def test_what_does_not_exist_is_refused(core: Core, kind: int, dim: int) -> None:
    job = CTrellis(kind, dim)
    with pytest.raises(NativeError):
        native.check_status(core.trellis_encode(None, ctypes.byref(job), 1))


def test_without_a_core_the_reference_runs_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("turbomoe.native.library._opened", [])
    monkeypatch.setattr("turbomoe.native.library.find_library", lambda: None)
    monkeypatch.setattr("turbomoe.notices.board._printed", set())
    codec, x = make_codec("tcq3", 64), torch.randn(3, 64)
    assert isinstance(codec, TrellisCodec)
    for got, want in zip(codec.encode(x), codec.encode_plainly(x), strict=True):
        assert torch.equal(got, want)
    assert "in plain PyTorch" in capsys.readouterr().err
