"""Triton: attention of a block of new tokens over pages of codes and over exact vectors, in one pass each.

A program takes ROWS queries of one KV head: row r of them is query head r % GROUP of the position r // GROUP after
the first. ``coded`` runs over pages, or over a part of them where few queries would leave processors idle; ``exact``
runs over the sinks and the window. Each leaves the maximum and sum of its softmax, in units of log2, and its weighted
mean of values; PyTorch merges them (``prefill_launch.py``). A page is decoded in registers by each program that reads
it, or once for all programs by ``expand``, into a slab of bounded size. The reference is ``kv/prefill.py``, with the
same rule of windows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from turbomoe.kv.kernels.codes import row_order
from turbomoe.kv.kernels.tiles import PAGE, stored_scales, stored_tile, tiles_each

PAGES = tl.constexpr(16)  # whose means meet the queries in one product
CHANNELS = tl.constexpr(32)  # of it at a time


@triton.jit
def _queries(q, head, rows, row, D: tl.constexpr):
    """Queries [ROWS, D] of a KV head, zeros beyond the last."""
    place = q + (head * rows + row)[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(place, mask=(row < rows)[:, None], other=0.0)


@triton.jit
def _mean_scores(
    pairs, still, turns, head, rows, row, first, turn_rows, WIDTH: tl.constexpr, TURNS: tl.constexpr
):  # fmt: skip
    """Scores of queries with the means of PAGES pages: float32 [PAGES, ROWS]; see ``turns.page_scores``."""
    page = first + tl.arange(0, PAGES)
    at = head * rows + row
    scores = tl.zeros((PAGES, row.shape[0]), tl.float32)
    for channel in tl.range(0, WIDTH, CHANNELS):
        c = channel + tl.arange(0, CHANNELS)
        angle = turns + page[:, None] * TURNS + c[None, :]
        angles = tl.load(angle, mask=(page < turn_rows)[:, None] & (c < TURNS)[None, :], other=0.0)
        pair = tl.load(pairs + at[None, :] * WIDTH + c[:, None], mask=(row < rows)[None, :], other=0.0)
        scores = tl.dot(angles, pair, scores, input_precision="tf32x3")
    return scores + tl.load(still + at, mask=row < rows, other=0.0)[None, :]


@triton.jit
def _fold(top, total, far, scores, v, v_scale, SCALED: tl.constexpr, PRECISION: tl.constexpr):
    """One tile into a running softmax: scores [ROWS, PAGE] in log2 units, values [PAGE, D]; far [ROWS, D]."""
    new = tl.maximum(top, tl.max(scores, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    shrink = tl.exp2(top - safe)
    weights = tl.exp2(scores - safe[:, None])
    total = total * shrink + tl.sum(weights, 1)
    if SCALED:
        weights = weights * v_scale[None, :]
    far = tl.dot(weights.to(v.dtype), v, far * shrink[:, None], input_precision=PRECISION)
    return new, total, far


@triton.jit
def _leave(part_top, part_total, part_far, at, valid, top, total, far, D: tl.constexpr):
    """Store what was found for rows ``at`` of the parts: ``far`` [ROWS, D] as a mean of values."""
    tl.store(part_top + at, top, mask=valid)
    tl.store(part_total + at, total, mask=valid)
    mean = far * (1.0 / tl.where(total > 0, total, 1.0))[:, None]
    tl.store(part_far + at[:, None] * D + tl.arange(0, D)[None, :], mean, mask=valid[:, None])


@triton.jit(do_not_specialize=["origin", "pages_per_slot"])
def expand(
    pages, codes, scales, dims, table, slab, origin, pages_per_slot,
    KV_HEADS: tl.constexpr, D: tl.constexpr, KIND: tl.constexpr, WIDTH: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Grid (pages of a slab, B * KV_HEADS): slab [B, pages, KV_HEADS, PAGE, D], decoded from page ``origin`` on."""
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = head // KV_HEADS, head % KV_HEADS
    page = tl.load(pages + b * pages_per_slot + tl.minimum(origin + tile, pages_per_slot - 1))
    n, order = tl.arange(0, PAGE), tl.load(dims + tl.arange(0, D))
    x = stored_tile(codes, scales, (page * KV_HEADS + h) * PAGE, n >= 0, order, table, D, KIND, WIDTH, 0, 1, False, ASM)
    if KIND != "bf16" and KIND != "f16" and KIND != "q8_0":
        x = x * stored_scales(scales, page, h, KV_HEADS, True)[:, None]
    row = ((b * tl.num_programs(0) + tile) * KV_HEADS + h) * PAGE + row_order(n)
    tl.store(slab + row[:, None] * D + tl.arange(0, D)[None, :], x.to(slab.dtype.element_ty))


@triton.jit(do_not_specialize=["first", "rows", "origin", "pages_per_slot", "turn_rows"])
def coded(
    q, pairs, still, starts, pages, turns, k_codes, k_scales, k_dims, k_table, v_codes, v_scales, v_dims, v_table,
    part_top, part_total, part_far, factor, first, rows, origin, pages_per_slot, turn_rows,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BEHIND: tl.constexpr,
    K_KIND: tl.constexpr, V_KIND: tl.constexpr, K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    HAS_MEAN: tl.constexpr, WIDTH: tl.constexpr, TURNS: tl.constexpr, CARRY: tl.constexpr, STAGES: tl.constexpr,
    K_AS: tl.constexpr, V_AS: tl.constexpr, ASM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of ROWS, splits, B * KV_HEADS). The query at t sees what lies in pages from 0 to t - BEHIND.

    Of that, the program reads pages from ``origin`` on that the table ``pages`` [B, pages_per_slot] knows; with CARRY
    its part goes on from what lies there. q [B, KV_HEADS, rows, D], its dims in the order of ``k_dims``; scores are
    products in the type K_AS times ``factor``. pairs float32 [B, KV_HEADS, rows, WIDTH], still [B, KV_HEADS, rows] and
    turns [turn_rows, TURNS] give the scores with the keys' means, in units of log2.
    """
    split, splits, head = tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    b, h = head // KV_HEADS, head % KV_HEADS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = (split.to(tl.int64) * tl.num_programs(2) + head) * rows + row
    start = tl.load(starts + b) - BEHIND + first
    limit = start + row // GROUP
    end = start + tl.minimum(tl.program_id(0) * ROWS + ROWS - 1, rows - 1) // GROUP
    tiles = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(end, 0), PAGE) - origin, 0), pages_per_slot)
    each = tiles_each(tiles, splits)
    begin, last = origin + split * each, origin + tl.minimum((split + 1) * each, tiles)
    V_SCALED: tl.constexpr = V_KIND != "bf16" and V_KIND != "f16" and V_KIND != "q8_0"
    K_SCALED: tl.constexpr = K_KIND != "bf16" and K_KIND != "f16" and K_KIND != "q8_0"
    if CARRY:
        top = tl.load(part_top + part, mask=row < rows, other=float("-inf"))
        total = tl.load(part_total + part, mask=row < rows, other=0.0)
        place = part_far + part[:, None] * D + tl.arange(0, D)[None, :]
        far = tl.load(place, mask=(row < rows)[:, None], other=0.0) * total[:, None]
    else:
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        far = tl.zeros((ROWS, D), tl.float32)
    if begin < last:
        queries = _queries(q, head, rows, row, D).to(K_AS)
        dims, v_order = tl.load(k_dims + tl.arange(0, D)), tl.load(v_dims + tl.arange(0, D))
        n, i = tl.arange(0, PAGE), tl.arange(0, PAGES)
        table = pages + b * pages_per_slot - origin
        whole = tl.maximum(start + tl.program_id(0) * ROWS // GROUP, 0) // PAGE  # tiles that every row sees all of
        for masked in tl.static_range(2):
            fro = tl.minimum(tl.maximum(begin, whole), last) if masked else begin
            to = last if masked else tl.minimum(whole, last)
            # The compiler prefetches codes; scales are too small for that, would be waited for, and so come earlier.
            page = tl.load(table + tl.minimum(fro, last - 1))
            next_page = tl.load(table + tl.minimum(fro + 1, last - 1))
            k_scale = stored_scales(k_scales, page, h, KV_HEADS, K_SCALED)
            v_scale = stored_scales(v_scales, page, h, KV_HEADS, V_SCALED)
            for group in tl.range(fro, to, PAGES if HAS_MEAN else 1 << 30, num_stages=1):
                stop = tl.minimum(group + PAGES, to) if HAS_MEAN else to
                if HAS_MEAN:
                    offsets = _mean_scores(pairs, still, turns, head, rows, row, group, turn_rows, WIDTH, TURNS)
                for tile in tl.range(group, stop, num_stages=STAGES):
                    page_after = tl.load(table + tl.minimum(tile + 2, last - 1))
                    next_k_scale = stored_scales(k_scales, next_page, h, KV_HEADS, K_SCALED)
                    next_v_scale = stored_scales(v_scales, next_page, h, KV_HEADS, V_SCALED)
                    at = (tl.load(table + tile) * KV_HEADS + h) * PAGE
                    index = tile * PAGE + row_order(n)
                    seen = index < end if masked else n >= 0
                    k = stored_tile(k_codes, k_scales, at, seen, dims, k_table, D, K_KIND, K_WIDTH, 0, 1, False, ASM)
                    scores = tl.dot(queries, tl.trans(k.to(K_AS)), input_precision=PRECISION)
                    if K_SCALED:
                        scores = scores * (k_scale.to(tl.float32) * factor)[None, :]
                    else:
                        scores = scores * factor
                    if HAS_MEAN:
                        scores += tl.sum(tl.where((i == tile - group)[:, None], offsets, 0.0), 0)[:, None]
                    if masked:
                        scores = tl.where(index[None, :] < limit[:, None], scores, float("-inf"))
                    v = stored_tile(v_codes, v_scales, at, seen, v_order, v_table, D, V_KIND, V_WIDTH, 0, 1, False, ASM)
                    # Rows that nobody has written yet may hold any scale, NaN too.
                    sure = tl.where(seen, v_scale.to(tl.float32), 0.0)
                    top, total, far = _fold(top, total, far, scores, v.to(V_AS), sure, V_SCALED, PRECISION)
                    next_page, k_scale, v_scale = page_after, next_k_scale, next_v_scale
    _leave(part_top, part_total, part_far, part, row < rows, top, total, far, D)


@triton.jit
def _exact(sinks, fresh, slot_head, head, index, window, seen, is_sink, D: tl.constexpr, SINK: tl.constexpr):
    """Exact vectors [PAGE, D]: of the sinks, or number ``index`` of ring and chunk; zeros where not seen."""
    place = tl.where(is_sink, sinks + (slot_head * SINK + index) * D, fresh + (head * window + index) * D)
    return tl.load(place[:, None] + tl.arange(0, D)[None, :], mask=seen[:, None], other=0.0)


@triton.jit(do_not_specialize=["first", "rows", "window"])
def exact(
    q, starts, slots, k_sinks, v_sinks, k_fresh, v_fresh, part_top, part_total, part_far, factor, first, rows, window,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, SINK: tl.constexpr,
    RECENT: tl.constexpr, STAGES: tl.constexpr, K_AS: tl.constexpr, V_AS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of ROWS, B * KV_HEADS): the sinks, and of positions start - RECENT and on those within RECENT.

    k_fresh, v_fresh [B, KV_HEADS, window, D]: the ring in order of position, then the chunk.
    """
    head = tl.program_id(1).to(tl.int64)
    b, h = head // KV_HEADS, head % KV_HEADS
    slot_head = tl.load(slots + b) * KV_HEADS + h
    row, n = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PAGE)
    start = tl.load(starts + b)
    t = start + first + row // GROUP
    begin = first + tl.program_id(0) * ROWS // GROUP
    queries = _queries(q, head, rows, row, D).to(K_AS)
    SINKS: tl.constexpr = (SINK + PAGE - 1) // PAGE
    TILES: tl.constexpr = SINKS + (RECENT + ROWS // GROUP + 1 + PAGE) // PAGE
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    far = tl.zeros((ROWS, D), tl.float32)
    for tile in tl.range(0, TILES, num_stages=STAGES):
        is_sink = tile < SINKS
        index = tl.where(is_sink, tile * PAGE, begin + (tile - SINKS) * PAGE) + n
        position = tl.where(is_sink, index, start - RECENT + index)
        seen = tl.where(is_sink, index < SINK, (index < window) & (position >= SINK))
        visible = seen[None, :] & (position[None, :] <= t[:, None])
        visible = visible & (is_sink | (position[None, :] >= t[:, None] - RECENT))
        k = _exact(k_sinks, k_fresh, slot_head, head, index, window, seen, is_sink, D, SINK).to(K_AS)
        scores = tl.dot(queries, tl.trans(k), input_precision=PRECISION) * factor
        scores = tl.where(visible, scores, float("-inf"))
        v = _exact(v_sinks, v_fresh, slot_head, head, index, window, seen, is_sink, D, SINK).to(V_AS)
        top, total, far = _fold(top, total, far, scores, v, top, False, PRECISION)
    _leave(part_top, part_total, part_far, head * rows + row, row < rows, top, total, far, D)
