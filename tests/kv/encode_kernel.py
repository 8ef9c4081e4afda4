"""Run by ``test_encode_kernel.py`` in Triton's interpreter: the search over small trellises against its reference."""

from __future__ import annotations

import torch

from turbomoe.kv import trellis_fixed
from turbomoe.kv.codecs.scales import spread_out
from turbomoe.kv.codecs.windows import pack_steps, to_planes
from turbomoe.kv.kernels import encode, encode_assembly, encode_input, encode_step, encoding
from turbomoe.kv.trellis_codebook import ALL, TRELLISES, Lookup, Magnitudes, Trellis, codebook
from turbomoe.kv.trellis_fixed import search_fixed, to_halves

FIRST = Lookup(((0, ALL), (1, ALL), (3, ALL), (2, ALL)), (-40, 12, 25, -9, 38, -21, 3, -14))
SECOND = Lookup(((2, ALL), (0, ALL), (1, 0x66)), (7, -26, 17, 30, -5, 11, -33, 2))
TINY = (
    (Trellis("two of six", 6, 2, 1, 2, (FIRST, SECOND)), 71),
    (Trellis("three bits", 6, 3, 1, 4, (FIRST, SECOND)), 40),
    (
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
        53,
    ),
)


def vectors(n: int, dim: int) -> torch.Tensor:
    """Gaussian ones, and some far from that."""
    spread = spread_out(torch.randn(n, dim))[0]
    spread[3], spread[4], spread[5] = 0, 4, torch.tensor((4.0, -4.0)).repeat(dim // 2)
    spread[6], spread[6, 9] = 0, dim**0.5
    return spread


def columns(spread: torch.Tensor, trellis: Trellis) -> torch.Tensor:
    """What the kernel reads, of coordinates that need not have unit variance."""
    n, dim = spread.shape
    padded = -(-n // encode.VECTORS) * encode.VECTORS
    x = torch.zeros(dim, padded, dtype=torch.float16)
    x[:, :n] = to_halves(spread, trellis).t()
    return x.view(torch.int32)


def check_input(dim: int, dtype: torch.dtype) -> None:
    """Bit by bit what PyTorch's operations make of vectors, also of those without a direction."""
    x = torch.randn(97, dim).to(dtype)
    x[3], x[4, 1], x[5, 2], x[6], x[7, 1:] = 0, float("nan"), float("inf"), 6e-8, 0
    x[8] *= 1e4
    x[9] = torch.arange(dim) % 7 - 3
    spread, peak, norm = spread_out(x.float())
    for name, trellis in TRELLISES.items():
        found, peaks, norms = encode_input.columns(x, trellis)
        want = columns(spread.nan_to_num(nan=0.0), trellis)
        assert torch.equal(*(each.view(torch.float16) for each in (found, want))), (name, dim, dtype)  # 0 equals -0
        fine = norm[:, 0].isfinite()
        assert torch.equal(peaks[fine], peak[fine, 0]) and torch.equal(norms[fine], norm[fine, 0])
        assert not norms[~fine].isfinite().any()
    print("input equal", dim, dtype, flush=True)


def check(trellis: Trellis, n: int) -> None:
    """Vectors of 32 steps; the last program is not full, and an odd last vector has no neighbour."""
    encode_step.PLANS[trellis.name] = encode_assembly.plan(trellis)
    spread = vectors(n, 32 * trellis.values)
    codes, squares = encoding.search(columns(spread, trellis), n, trellis, asm=False)
    windows = search_fixed(spread, trellis)
    stream = pack_steps(windows & (1 << trellis.step_bits) - 1, trellis.step_bits)
    assert torch.equal(codes.view(torch.uint8), to_planes(stream, trellis)), trellis.name
    want = codebook(trellis).t()[windows].flatten(1).square().sum(-1)
    torch.testing.assert_close(squares, want)
    print(trellis.name, "equal", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    for dim, dtype in ((64, torch.float32), (128, torch.bfloat16), (256, torch.float16)):
        check_input(dim, dtype)
    trellis_fixed.RENEWED[2] = 1  # as for 4 bits, whose trellises are too large for this
    for trellis, n in TINY:
        check(trellis, n)
