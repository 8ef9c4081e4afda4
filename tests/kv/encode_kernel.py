"""Run by ``test_encode_kernel.py`` in Triton's interpreter: the search over small trellises against its reference."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from turbomoe.kv import trellis_pairs
from turbomoe.kv.codecs.scales import spread_out
from turbomoe.kv.codecs.windows import pack_steps, to_planes
from turbomoe.kv.kernels import encode, encode_pairs, encoding
from turbomoe.kv.trellis_codebook import ALL, Lookup, Magnitudes, Trellis, codebook
from turbomoe.kv.trellis_fixed import fixed, search_fixed

FIRST = Lookup(((0, ALL), (1, ALL), (3, ALL), (2, ALL)), (-40, 12, 25, -9, 38, -21, 3, -14))
SECOND = Lookup(((2, ALL), (0, ALL), (1, 0x66)), (7, -26, 17, 30, -5, 11, -33, 2))
TINY = [
    Trellis("three bits", 6, 3, 1, 4, (FIRST, SECOND)),
    Trellis(
        "three bits, pairs",
        6,
        3,
        2,
        0,
        (),
        Magnitudes(
            ((33, 9, 20, 4, 1, 16), (18, 36, 42, 8, 32, 2)),
            (11, 33, 63, 93, 117, 127, 141, 169),
        ),
    ),
]
TINY_PAIRS = [
    Trellis("two bits", 4, 2, 1, 2, (FIRST, SECOND)),
    Trellis("two of six", 6, 2, 1, 2, (FIRST, SECOND)),
]


@triton.jit
def kernel(
    x, table, scratch, codes, squares, first, n, stride, STEPS, SLOPES: tl.constexpr, OFFSETS: tl.constexpr,
    VALUES: tl.constexpr, KB: tl.constexpr, G: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    encode._search(
        x, table, scratch, codes, squares, first, n, stride, STEPS, SLOPES, OFFSETS, VALUES, KB, G, WORDS, False
    )


@triton.jit
def pair_kernel(
    x, table, scratch, codes, squares, first, n, stride, STEPS, LEVELS: tl.constexpr, NUMBERS: tl.constexpr,
    G: tl.constexpr,
):  # fmt: skip
    encode_pairs._search(x, table, scratch, codes, squares, first, n, stride, STEPS, LEVELS, NUMBERS, G, False)


def vectors(n: int, dim: int) -> torch.Tensor:
    """Gaussian ones, and some far from that."""
    spread = spread_out(torch.randn(n, dim))[0]
    spread[3], spread[4], spread[5] = 0, 4, torch.tensor((4.0, -4.0)).repeat(dim // 2)
    spread[6], spread[6, 9] = 0, dim**0.5
    return spread


def compare(trellis: Trellis, spread: torch.Tensor, codes: torch.Tensor, squares: torch.Tensor) -> None:
    windows = search_fixed(spread, trellis)
    stream = pack_steps(windows & (1 << trellis.step_bits) - 1, trellis.step_bits)
    assert torch.equal(codes.view(torch.uint8), to_planes(stream, trellis)), trellis.name
    want = codebook(trellis).t()[windows].flatten(1).square().sum(-1)
    torch.testing.assert_close(squares, want)
    print(trellis.name, "equal", flush=True)


def check(trellis: Trellis, n: int) -> None:
    """Vectors of 32 steps, the last program not full."""
    steps, programs = 32, triton.cdiv(n, encode.VECTORS)
    spread = vectors(n, steps * trellis.values)
    x = encoding._columns(spread, trellis, encode.VECTORS)
    codes, squares = torch.zeros(n, steps * trellis.step_bits // 32, dtype=torch.int32), torch.zeros(n)
    scratch = torch.zeros(2 * 64 * 32 * 16, dtype=torch.int32)
    parts = fixed(trellis)
    kernel[(programs,)](
        x, codebook(trellis), scratch, codes, squares, 0, n, x.shape[1], steps, parts.slopes, parts.offsets,
        trellis.values, trellis.step_bits, trellis.groups, trellis.group_words,
    )  # fmt: skip
    compare(trellis, spread, codes, squares)


def check_pairs(trellis: Trellis, n: int) -> None:
    """Vectors of 32 steps; an odd last one has no neighbour."""
    steps, programs = 32, triton.cdiv(n, encode_pairs.VECTORS)
    spread = vectors(n, steps)
    x = encoding._columns(spread, trellis, encode_pairs.VECTORS)
    codes, squares = torch.zeros(n, steps // 16, dtype=torch.int32), torch.zeros(n)
    scratch = torch.zeros(2 * 64 * 32 * 4, dtype=torch.int32)
    pair_kernel[(programs,)](
        x, codebook(trellis), scratch, codes, squares, 0, n, x.shape[1], steps,
        *trellis_pairs.levels(trellis), trellis.groups,
    )  # fmt: skip
    compare(trellis, spread, codes, squares)


if __name__ == "__main__":
    torch.manual_seed(0)
    for trellis, n in zip(TINY, (40, 20), strict=True):
        check(trellis, n)
    for trellis, n in zip(TINY_PAIRS, (71, 50), strict=True):
        check_pairs(trellis, n)
