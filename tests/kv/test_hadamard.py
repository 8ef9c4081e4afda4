"""The randomized Hadamard rotation: the right matrix, the same bits for every batch, fixed signs."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch

from turbomoe.errors import SettingsError
from turbomoe.kv.hadamard import CACHED_VALUES, hadamard, random_signs, rotate, unrotate

SIZES = [8, 16, 64, 128, 256, 512]
# First 64 signs as a hexadecimal number (set bit: -1, lowest dim first): they are part of every stored cache.
SIGN_WORDS = {64: "071dcc4557dc5a6e", 128: "edded24826b5c6fd", 256: "fa392cc0139caa0c"}


def sylvester(n: int) -> torch.Tensor:
    """The Hadamard matrix by its closed form: the sign is the parity of the common bits of row and column."""
    rows = [[(-1.0) ** (row & column).bit_count() for column in range(n)] for row in range(n)]
    return torch.tensor(rows, dtype=torch.float64) / math.sqrt(n)


@pytest.mark.parametrize("n", SIZES)
def test_it_is_the_sylvester_matrix(n: int) -> None:
    x = torch.randn(33, n, dtype=torch.float64)
    assert torch.allclose(hadamard(x).double(), x @ sylvester(n), atol=2e-6)


@pytest.mark.parametrize("n", SIZES)
def test_rotation_is_undone_and_keeps_dot_products(n: int) -> None:
    a, b = torch.randn(2, 50, n)
    assert torch.allclose(unrotate(rotate(a)), a, atol=2e-6)
    dots, rotated_dots = (a.double() * b).sum(-1), (rotate(a).double() * rotate(b)).sum(-1)
    assert torch.allclose(dots, rotated_dots, atol=1e-5 * n)


@pytest.mark.parametrize("n", SIZES)
def test_signs_come_before_the_transform(n: int) -> None:
    x = torch.randn(5, n)
    assert torch.equal(rotate(x), hadamard(x * random_signs(n)))
    assert torch.equal(unrotate(x), hadamard(x) * random_signs(n))


@pytest.mark.parametrize("n", [64, 256])
def test_the_bits_of_a_vector_do_not_depend_on_its_batch(n: int) -> None:
    count = 2 * CACHED_VALUES // n + 3  # more than two chunks
    x = torch.randn(count, n)
    together = rotate(x)
    for row in (0, 1, CACHED_VALUES // n - 1, CACHED_VALUES // n, count - 1):
        assert torch.equal(together[row], rotate(x[row]))
    assert torch.equal(together[: count - 1].view(2, -1, n), rotate(x[: count - 1].view(2, -1, n)))
    strided = x.t().contiguous().t()
    assert torch.equal(together, rotate(strided))


@pytest.mark.parametrize("shape", [(64,), (1, 64), (0, 64), (2, 3, 0, 64), (2, 3, 5, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shapes_types_and_an_input_left_alone(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    before = x.clone()
    for function in (hadamard, rotate, unrotate):
        y = function(x)
        assert y.shape == x.shape and y.dtype == torch.float32 and y.is_contiguous()
        assert torch.equal(x, before)


def test_it_works_in_and_out_of_inference_mode() -> None:
    random_signs.cache_clear()
    with torch.inference_mode():
        rotate(torch.randn(2, 64))
    x = torch.randn(2, 64, requires_grad=True)
    assert not unrotate(rotate(x)).requires_grad


def test_one_large_coordinate_is_spread_evenly() -> None:
    y = rotate(torch.nn.functional.one_hot(torch.tensor(17), 128).float())
    assert torch.allclose(y.abs(), torch.full((128,), 128**-0.5))


@pytest.mark.parametrize("n", SIGN_WORDS)
def test_signs_are_pinned(n: int) -> None:
    word = sum(1 << i for i, sign in enumerate(random_signs(n)[:64].tolist()) if sign < 0)
    assert f"{word:016x}" == SIGN_WORDS[n]


def test_long_signs_take_their_bits_from_numbered_blocks() -> None:
    second = hashlib.sha256(b"turbomoe randomized hadamard 1/512/1").digest()
    negative = [bool(second[i // 8] >> i % 8 & 1) for i in range(256)]
    assert (random_signs(512)[256:] < 0).tolist() == negative


@pytest.mark.parametrize("n", [1, 2, 4, 7, 80, 96, 100, 192])
def test_other_sizes_are_refused_with_the_reason(n: int) -> None:
    with pytest.raises(SettingsError, match="power of two"):
        hadamard(torch.zeros(3, n))
