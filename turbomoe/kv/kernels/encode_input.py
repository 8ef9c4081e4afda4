"""Triton: vectors as ``encode.py`` reads them, in one pass; PyTorch's ten take a third of the whole encoding.

What ``codecs/scales.py`` (``spread_out``) and ``trellis_fixed.py`` (``to_halves``) compute, operation by operation: so
multiplications and additions must not be fused.
"""

# Triton's language has no types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,no-any-return"
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from turbomoe.kv.kernels.encode import VECTORS
from turbomoe.kv.trellis_codebook import Trellis
from turbomoe.kv.trellis_fixed import GRID as _GRID
from turbomoe.kv.trellis_fixed import LARGEST as _LARGEST
from turbomoe.kv.trellis_fixed import fixed

ROWS = 16  # vectors of a program
GRID, LARGEST = tl.constexpr(_GRID), tl.constexpr(_LARGEST)
EVEN = tl.constexpr(1.5 * 2.0**23)  # added and taken off: rounds to integers, ties to even


@triton.jit
def _sum_by_halves(x, ROWS: tl.constexpr, D: tl.constexpr):
    """``scales.tree_sum`` of x [ROWS, D]: [ROWS]."""
    ROUNDS: tl.constexpr = 6 + (D > 64) + (D > 128)
    for _ in tl.static_range(ROUNDS):
        low, high = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, x.shape[1] // 2)), (0, 2, 1)))
        x = low + high
    return tl.reshape(x, (ROWS,))


@triton.jit(do_not_specialize=["n"])
def columns_of(
    x, out, peaks, norms, n, stride, D: tl.constexpr, ROOT: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr
):
    """x [n, D] to float16 out [D, stride], zeros beyond n; float32 peaks and norms [n] as ``spread_out`` has them."""
    row, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    inside = row < n
    place = x + row.to(tl.int64)[:, None] * D + d[None, :]
    values = tl.load(place, mask=inside[:, None], other=0.0).to(tl.float32)
    peak = tl.max(tl.abs(values), 1)
    unit = tl.div_rn(values, tl.where(peak > 0, peak, 1.0)[:, None])
    norm = tl.sqrt_rn(_sum_by_halves(unit * unit, ROWS, D))
    spread = unit * (tl.div_rn(1.0, norm) * ROOT)[:, None]
    spread = tl.where(spread == spread, spread, 0.0)
    scaled = tl.minimum(tl.maximum(spread, -LARGEST), LARGEST) * SCALE * (1 / GRID)
    rounded = (scaled + EVEN - EVEN) * GRID
    tl.store(out + d.to(tl.int64)[None, :] * stride + row[:, None], rounded.to(tl.float16))
    tl.store(peaks + row, peak, mask=inside)
    tl.store(norms + row, norm, mask=inside)


def columns(x: torch.Tensor, trellis: Trellis) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Vectors [n, head_dim] as int32 [head_dim, vectors / 2] for whole programs of ``encode.search``, two float16 in
    each; and their largest magnitudes and norms over those, float32 [n] both.
    """
    n, dim = x.shape
    padded = triton.cdiv(max(n, 1), VECTORS) * VECTORS
    out = torch.empty(dim, padded, dtype=torch.float16, device=x.device)
    peaks, norms = torch.empty(2, n, dtype=torch.float32, device=x.device)
    columns_of[(padded // ROWS,)](
        x.contiguous(), out, peaks, norms, n, padded, D=dim, ROOT=math.sqrt(dim), SCALE=fixed(trellis).scale, ROWS=ROWS,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out.view(torch.int32), peaks, norms
