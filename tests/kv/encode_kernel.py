"""Run by ``test_encode_kernel.py`` in Triton's interpreter: the search over small trellises against its reference."""

from __future__ import annotations

import torch

from turbomoe.kv import trellis_fixed
from turbomoe.kv.codecs.scales import spread_out
from turbomoe.kv.codecs.windows import pack_steps, to_planes
from turbomoe.kv.kernels import encode_assembly, encode_step, encoding
from turbomoe.kv.trellis_codebook import ALL, Lookup, Magnitudes, Trellis, codebook
from turbomoe.kv.trellis_fixed import search_fixed

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


def check(trellis: Trellis, n: int) -> None:
    """Vectors of 32 steps; the last program is not full, and an odd last vector has no neighbour."""
    encode_step.PLANS[trellis.name] = encode_assembly.plan(trellis)
    spread = vectors(n, 32 * trellis.values)
    codes, squares = encoding.search(spread, trellis, asm=False)
    windows = search_fixed(spread, trellis)
    stream = pack_steps(windows & (1 << trellis.step_bits) - 1, trellis.step_bits)
    assert torch.equal(codes.view(torch.uint8), to_planes(stream, trellis)), trellis.name
    want = codebook(trellis).t()[windows].flatten(1).square().sum(-1)
    torch.testing.assert_close(squares, want)
    print(trellis.name, "equal", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    trellis_fixed.RENEWED[2] = 1  # as for 4 bits, whose trellises are too large for this
    for trellis, n in TINY:
        check(trellis, n)
