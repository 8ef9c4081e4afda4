"""Triton: tiles of 64 stored vectors, a page of a KV head each, as decoding and prefill take them."""

from __future__ import annotations

import triton
import triton.language as tl

from turbomoe.kv.kernels.codes import row_order, vectors

PAGE = tl.constexpr(64)
QUERIES = tl.constexpr(16)  # the queries of a KV head, filled up
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def tiles_each(tiles, SPLITS: tl.constexpr):
    """Tiles of a part."""
    return tl.maximum(tl.cdiv(tiles, SPLITS), 1)


@triton.jit
def stored_tile(
    codes, scales, first, seen, dims, table, D: tl.constexpr, KIND: tl.constexpr, WIDTH: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, FOR_SCORES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """A chunk of 64 vectors of a plane from number ``first`` (int64) on, [64, D / CHUNKS], without their scales (q8_0
    has its own inside). Row n is vector ``row_order(n)``, and ``seen`` [64] is in that order.
    """
    PART: tl.constexpr = D // CHUNKS
    n, d = tl.arange(0, PAGE), CHUNK * PART + tl.arange(0, PART)
    at = first + row_order(n)
    if KIND == "bf16" or KIND == "f16" or KIND == "f32":
        x = tl.load(codes + at[:, None] * D + d[None, :], mask=seen[:, None], other=0.0)
        # The interpreter's products of bf16 are wrong; there everything exact is float32.
        return x if ASM else x.to(tl.float32)
    elif KIND == "q8_0":
        x = tl.load(codes + at[:, None] * D + d[None, :]).to(tl.float16)
        block = CHUNK * (PART // 32) + tl.arange(0, PART // 32)
        s = tl.load(scales + at[:, None] * (D // 32) + block[None, :], mask=seen[:, None], other=0.0)
        return tl.reshape(tl.reshape(x, (at.shape[0], PART // 32, 32)) * s[:, :, None], (at.shape[0], PART))
    else:
        return vectors(codes, (first + n) * WIDTH, dims, table, D, KIND, CHUNK, CHUNKS, FOR_SCORES, ASM)


@triton.jit
def stored_scales(scales, page, h, KV_HEADS: tl.constexpr, SCALED: tl.constexpr):
    """The scales of a page's vectors, in the order of ``stored_tile``: float16 [64]; ones for kinds without."""
    n = tl.arange(0, PAGE)
    if SCALED:
        return tl.load(scales + (page * KV_HEADS + h) * PAGE + row_order(n))
    else:
        return tl.full((PAGE,), 1.0, tl.float16)
