"""Run by ``test_encode_kernel.py`` in Triton's interpreter: the search over small trellises against its reference."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from turbomoe.kv.codecs.scales import spread_out
from turbomoe.kv.codecs.windows import pack_steps, to_planes
from turbomoe.kv.kernels import encode
from turbomoe.kv.trellis_codebook import Lookup, Trellis, codebook
from turbomoe.kv.trellis_fixed import fixed, search_fixed, to_fixed

FIRST = Lookup((0, 1, 3, 2), 0x96, 0x6, (-40, 12, 25, -9, 38, -21, 3, -14))
SECOND = Lookup((2, 0, 1, -1), 0x3C, 0xC, (7, -26, 17, 30, -5, 11, -33, 2))
TINY = [
    Trellis("two bits", 4, 2, 1, 2, (FIRST, SECOND)),
    Trellis("two of six", 6, 2, 1, 2, (FIRST, SECOND)),
    Trellis("three bits, pairs", 6, 3, 2, 8, (FIRST, SECOND)),
]


@triton.jit
def kernel(
    x, table, scratch, codes, squares, first, n, stride, STEPS, SLOPES: tl.constexpr, OFFSETS: tl.constexpr,
    VALUES: tl.constexpr, KB: tl.constexpr, G: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    encode._search(
        x, table, scratch, codes, squares, first, n, stride, STEPS, SLOPES, OFFSETS, VALUES, KB, G, WORDS, False
    )


def check(trellis: Trellis) -> None:
    """40 vectors of 32 steps, in two programs."""
    n, steps = 40, 32
    spread = spread_out(torch.randn(n, steps * trellis.values))[0]
    spread[3] = 0
    windows = search_fixed(spread, trellis)
    stream = pack_steps(windows & (1 << trellis.step_bits) - 1, trellis.step_bits)
    x = torch.zeros(steps * trellis.values, 64, dtype=torch.int16)
    x[:, :n] = to_fixed(spread, trellis).t()
    codes, squares = torch.zeros(n, steps * trellis.step_bits // 32, dtype=torch.int32), torch.zeros(n)
    scratch = torch.zeros(2 * 64 * 32 * 16, dtype=torch.int32)
    parts = fixed(trellis)
    kernel[(2,)](
        x, codebook(trellis), scratch, codes, squares, 0, n, 64, steps, parts.slopes, parts.offsets, trellis.values,
        trellis.step_bits, trellis.groups, trellis.group_words,
    )  # fmt: skip
    assert torch.equal(codes.view(torch.uint8), to_planes(stream, trellis.group_words)), trellis.name
    want = codebook(trellis).t()[windows].flatten(1).square().sum(-1)
    torch.testing.assert_close(squares, want)
    print(trellis.name, "equal", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    for trellis in TINY:
        check(trellis)
