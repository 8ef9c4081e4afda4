"""Triton: one new token of each sequence attends to exact windows and pages of codes; a launch of ``decode.py``.

One program runs for each KV head and part of the context, all queries of the head together. Parts [0, splits) read
pages, the rest the windows. A part leaves the running maximum and sum of its softmax, in units of log2, and its
weighted values. Values' scales are folded into the weights, and the maximum is taken over the products: so the
weights, in half precision, lie in [0, 1] and near 1 where it matters.

What is read before ``gdc_wait`` (codes, page tables, windows) the kernel before this one does not write.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from turbomoe.kv.kernels.codes import OFFSETS, are_bytes, decoded, lookup, row_order, words
from turbomoe.kv.kernels.tiles import LOG2E, PAGE, QUERIES, stored_scales, stored_tile, tiles_each

SMALLEST_SCALE = tl.constexpr(2.0**-24)  # of fp16; a scale of 0 is cut to it and its weight to 0


@triton.jit
def _words(
    codes, first, D: tl.constexpr, KIND: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """The codes of a chunk of 64 vectors from number ``first`` on, to be held for ``_held``; nothing if not AHEAD."""
    if AHEAD:
        return words(codes, (first + tl.arange(0, PAGE)) * WIDTH, D, KIND, CHUNK, CHUNKS)
    else:
        return (tl.zeros((1,), tl.int32),)


@triton.jit
def _held(
    held, tables, codes, scales, first, seen, dims, table, D: tl.constexpr, KIND: tl.constexpr, WIDTH: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, FOR_SCORES: tl.constexpr, AHEAD: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """``stored_tile`` of these vectors, from ``_words`` where they are held."""
    if AHEAD:
        return decoded(held, tables, KIND, FOR_SCORES)
    else:
        return stored_tile(codes, scales, first, seen, dims, table, D, KIND, WIDTH, CHUNK, CHUNKS, FOR_SCORES, ASM)


@triton.jit
def _queries(turned, first_row, column, GROUP: tl.constexpr, D: tl.constexpr, BYTES: tl.constexpr):
    """These columns of the queries of a KV head: [QUERIES, part]; of two bytes int8 [2 * QUERIES, part]."""
    q = tl.arange(0, QUERIES * (2 if BYTES else 1))
    row, mine = first_row + q % QUERIES, q % QUERIES < GROUP
    if BYTES:
        row = 2 * row + q // QUERIES
    return tl.load(turned + row[:, None] * D + column[None, :], mask=mine[:, None], other=0)


@triton.jit
def _summed(products, lift):
    """int32 products [64, 2 * QUERIES] of both bytes of queries, doubled and with the offset of keys: float32 [64,
    QUERIES].
    """
    high, low = tl.split(tl.permute(tl.reshape(products, (PAGE, 2, QUERIES)), (0, 2, 1)))
    return (high * 256 + low * 2 + lift[None, :]).to(tl.float32)


@triton.jit
def _scores(queries, k, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """float32 [64, QUERIES] of queries [QUERIES, part] and keys [64, part]; int32 [64, 2 * QUERIES] of bytes."""
    if EXACT:
        # Queries first, too few of them for wgmma: handed a loaded tile, that reads beyond it (triton 3.6, sm_90).
        return tl.trans(tl.dot(queries, tl.trans(k), input_precision=PRECISION))
    else:
        return tl.dot(k, tl.trans(queries))


@triton.jit
def _log2(x, ASM: tl.constexpr):
    """log2 of positive normal numbers: one instruction, with a relative error near 2^-22, for twenty of ``tl.log2``."""
    if ASM:
        return tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.log2(x)


@triton.jit
def _weigh(top, total, scores, v_scale, SCALED: tl.constexpr, ASM: tl.constexpr):
    """One tile into a running softmax: scores [64, QUERIES] in log2 units to (top, total, shrink, weights).

    ``total`` [64, QUERIES] is summed over its rows at the end: a sum between the warps in every tile costs two
    barriers.
    """
    if SCALED:
        log_scale = _log2(tl.maximum(v_scale, SMALLEST_SCALE), ASM)
        scores = scores + log_scale[:, None]
    new = tl.maximum(top, tl.max(scores, 0))
    safe = tl.where(new == float("-inf"), 0.0, new)
    shrink = tl.exp2(top - safe)
    weights = tl.exp2(scores - safe[None, :])
    if SCALED:
        total = total * shrink[None, :] + weights * tl.exp2(-log_scale)[:, None]
        weights = tl.where((v_scale > 0)[:, None], weights, 0.0)
    else:
        total = total * shrink[None, :] + weights
    return new, total, shrink, weights


@triton.jit
def _mix(far, shrink, weights, v, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """far [part, QUERIES] of what came before, shrunk, and values [64, part] by their weights [64, QUERIES]."""
    far = far * shrink[None, :]
    if EXACT:
        return far + tl.trans(tl.dot(tl.trans(weights.to(v.dtype)), v, input_precision=PRECISION))
    else:
        return tl.dot(tl.trans(v), weights.to(v.dtype), far)


@triton.jit
def _offset(offsets, row, mine, tile, pages_per_slot, HAS_MEAN: tl.constexpr):
    """Scores of the queries with the mean of a page: float32 [QUERIES]."""
    if HAS_MEAN:
        return tl.load(offsets + row * pages_per_slot + tile, mask=mine, other=0.0)
    else:
        return tl.zeros((QUERIES,), tl.float32)


@triton.jit
def _leave(part_top, part_total, part, top, total, PARTS: tl.constexpr):
    """Store the maximum and the sum of a part, [QUERIES] each: those of a query beside each other."""
    at = (part // PARTS * QUERIES + tl.arange(0, QUERIES)) * PARTS + part % PARTS
    tl.store(part_top + at, top)
    tl.store(part_total + at, total)


@triton.jit
def _leave_values(part_far, part, total, far, first, D: tl.constexpr):
    """Store columns of a part's values from ``first`` on, ``far`` [QUERIES, some], as means."""
    q = tl.arange(0, QUERIES)
    mean = far * (1.0 / tl.where(total > 0, total, 1.0))[:, None]
    at = part * QUERIES * D + q[:, None] * D + first + tl.arange(0, far.shape[1])[None, :]
    tl.store(part_far + at, mean.to(tl.float16))


@triton.jit
def _pages(
    turned, factors, lifts, offsets, starts, pages, k_codes, k_scales, k_dims, k_table, v_codes, v_scales, v_dims,
    v_table, part_top, part_total, part_far, split, part, b, h, pages_per_slot,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BEHIND: tl.constexpr,
    K_KIND: tl.constexpr, V_KIND: tl.constexpr, K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, HAS_MEAN: tl.constexpr,
    SPLITS: tl.constexpr, PARTS: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
    ASM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    coded = tl.load(starts + b) - BEHIND
    tiles = tl.cdiv(tl.maximum(coded, 0), PAGE)
    each = tiles_each(tiles, SPLITS)
    first, last = split * each, tl.minimum((split + 1) * each, tiles)
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    if first >= last:
        if EARLY:
            gdc_wait()
        _leave(part_top, part_total, part, top, tl.zeros((QUERIES,), tl.float32), PARTS)
        return
    q = tl.arange(0, QUERIES)
    mine, row = q < GROUP, b * HEADS + h * GROUP + q
    PART: tl.constexpr = D // CHUNKS
    part_of, n = tl.arange(0, PART), tl.arange(0, PAGE)
    V_EXACT: tl.constexpr = V_KIND == "bf16" or V_KIND == "f16" or V_KIND == "f32"
    K_EXACT: tl.constexpr = K_KIND == "bf16" or K_KIND == "f16" or K_KIND == "f32"
    V_SCALED: tl.constexpr = not V_EXACT and V_KIND != "q8_0"
    K_SCALED: tl.constexpr = not K_EXACT and K_KIND != "q8_0"
    K_BYTES: tl.constexpr = are_bytes(K_KIND, OFFSETS)
    K_AHEAD: tl.constexpr = ASM and K_SCALED
    V_AHEAD: tl.constexpr = ASM and V_SCALED
    k_tables, v_tables = lookup(k_table, K_KIND), lookup(v_table, V_KIND)
    k_order, v_order = tl.load(k_dims + part_of), tl.load(v_dims + part_of)
    row_of_table = pages + b * pages_per_slot
    # Keys' codes and all scales are held in registers a tile ahead, values' codes are read at the start of their own
    # (exact values and q8_0: by the compiler's prefetching).
    page = tl.load(row_of_table + first)
    next_page = tl.load(row_of_table + tl.minimum(first + 1, last - 1))
    k_scale = stored_scales(k_scales, page, h, KV_HEADS, K_SCALED)
    v_scale = stored_scales(v_scales, page, h, KV_HEADS, V_SCALED)
    at = (page * KV_HEADS + h) * PAGE
    k_held = _words(k_codes, at, D, K_KIND, K_WIDTH, 0, CHUNKS, K_AHEAD)
    if CHUNKS == 2:
        k_order_2, v_order_2 = tl.load(k_dims + PART + part_of), tl.load(v_dims + PART + part_of)
        k_held_2 = _words(k_codes, at, D, K_KIND, K_WIDTH, 1, CHUNKS, K_AHEAD)
        far_2 = tl.zeros((PART, QUERIES), tl.float32)
    total = tl.zeros((PAGE, QUERIES), tl.float32)
    far = tl.zeros((PART, QUERIES), tl.float32)
    if EARLY:
        gdc_wait()
    queries = _queries(turned, b * HEADS + h * GROUP, part_of, GROUP, D, K_BYTES)
    if K_EXACT:
        queries = queries.to(k_codes.dtype.element_ty if ASM else tl.float32)
    if CHUNKS == 2:
        queries_2 = _queries(turned, b * HEADS + h * GROUP, PART + part_of, GROUP, D, K_BYTES).to(queries.dtype)
    if K_BYTES:
        lift = tl.load(lifts + row, mask=mine, other=0)
    factor = tl.load(factors + row, mask=mine, other=0.0)
    offset = _offset(offsets, row, mine, first, pages_per_slot, HAS_MEAN)
    for tile in tl.range(first, last, num_stages=STAGES):
        next_offset = _offset(offsets, row, mine, tl.minimum(tile + 1, last - 1), pages_per_slot, HAS_MEAN)
        page_after = tl.load(row_of_table + tl.minimum(tile + 2, last - 1))
        next_k_scale = stored_scales(k_scales, next_page, h, KV_HEADS, K_SCALED)
        next_v_scale = stored_scales(v_scales, next_page, h, KV_HEADS, V_SCALED)
        next_at = (next_page * KV_HEADS + h) * PAGE
        here = (page * KV_HEADS + h) * PAGE
        v_held = _words(v_codes, here, D, V_KIND, V_WIDTH, 0, CHUNKS, V_AHEAD)
        if CHUNKS == 2:
            v_held_2 = _words(v_codes, here, D, V_KIND, V_WIDTH, 1, CHUNKS, V_AHEAD)
        next_k = _words(k_codes, next_at, D, K_KIND, K_WIDTH, 0, CHUNKS, K_AHEAD)
        if CHUNKS == 2:
            next_k_2 = _words(k_codes, next_at, D, K_KIND, K_WIDTH, 1, CHUNKS, K_AHEAD)
        at = (tl.load(row_of_table + tile) * KV_HEADS + h) * PAGE
        seen = tile * PAGE + row_order(n) < coded
        k = _held(
            k_held, k_tables, k_codes, k_scales, at, seen, k_order, k_table, D, K_KIND, K_WIDTH, 0, CHUNKS,
            True, K_AHEAD, ASM,
        )  # fmt: skip
        scores = _scores(queries, k, K_EXACT, PRECISION)
        if CHUNKS == 2:
            k = _held(
                k_held_2, k_tables, k_codes, k_scales, at, seen, k_order_2, k_table, D, K_KIND, K_WIDTH, 1, CHUNKS,
                True, K_AHEAD, ASM,
            )  # fmt: skip
            scores += _scores(queries_2, k, K_EXACT, PRECISION)
        if K_BYTES:
            scores = _summed(scores, lift)
        scores = scores * factor[None, :]
        if K_SCALED:
            scores = scores * k_scale.to(tl.float32)[:, None]
        scores = tl.where(seen[:, None], scores + offset[None, :], float("-inf"))
        # Rows that nobody has written yet may hold any scale, NaN too.
        sure = tl.where(seen, v_scale.to(tl.float32), 1.0)
        top, total, shrink, weights = _weigh(top, total, scores, sure, V_SCALED, ASM)
        v = _held(
            v_held, v_tables, v_codes, v_scales, at, seen, v_order, v_table, D, V_KIND, V_WIDTH, 0, CHUNKS,
            False, V_AHEAD, ASM,
        )  # fmt: skip
        far = _mix(far, shrink, weights, v, V_EXACT, PRECISION)
        if CHUNKS == 2:
            v = _held(
                v_held_2, v_tables, v_codes, v_scales, at, seen, v_order_2, v_table, D, V_KIND, V_WIDTH, 1, CHUNKS,
                False, V_AHEAD, ASM,
            )  # fmt: skip
            far_2 = _mix(far_2, shrink, weights, v, V_EXACT, PRECISION)
        page, next_page, k_scale, v_scale, offset = next_page, page_after, next_k_scale, next_v_scale, next_offset
        k_held = next_k
        if CHUNKS == 2:
            k_held_2 = next_k_2
    if EARLY:
        gdc_launch_dependents()
    sum_of_weights = tl.sum(total, 0)
    _leave(part_top, part_total, part, top, sum_of_weights, PARTS)
    _leave_values(part_far, part, sum_of_weights, tl.trans(far), 0, D)
    if CHUNKS == 2:
        _leave_values(part_far, part, sum_of_weights, tl.trans(far_2), PART, D)


@triton.jit
def _exact(
    sinks,
    ring,
    fresh,
    slot,
    b,
    h,
    index,
    seen,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
):
    """Exact vectors [N, D] number ``index`` of sinks, ring and the new token, side by side; zeros where not seen."""
    head = slot * KV_HEADS + h
    row = tl.where(index < SINK, sinks + (head * SINK + index) * D, ring + (head * RECENT + index - SINK) * D)
    row = tl.where(index == SINK + RECENT, fresh + (b * KV_HEADS + h) * D, row)
    return tl.load(row[:, None] + tl.arange(0, D)[None, :], mask=seen[:, None], other=0.0)


@triton.jit
def _windows(
    query, starts, slots, k_sinks, k_ring, k_fresh, v_sinks, v_ring, v_fresh, part_top, part_total, part_far, window,
    part, b, h, scale, query_stride_b, query_stride_h,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr,
    PARTS: tl.constexpr, EARLY: tl.constexpr, ASM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the windows: vectors from number ``window * PAGE`` on."""
    start, slot = tl.load(starts + b), tl.load(slots + b)
    q, d = tl.arange(0, QUERIES), tl.arange(0, D)
    place = query + b * query_stride_b + (h * GROUP + q)[:, None] * query_stride_h + d[None, :]
    queries = tl.load(place, mask=(q < GROUP)[:, None], other=0.0)
    queries = queries if ASM else queries.to(tl.float32)
    index = window * PAGE + tl.arange(0, PAGE)
    # Ring row r holds the last position that is r modulo RECENT; sinks are not counted twice.
    position = start - 1 - (start - 1 - (index - SINK) + 2 * RECENT) % max(RECENT, 1)
    seen = tl.where(index < SINK, index < start, (index < SINK + RECENT) & (position >= SINK) & (start > 0))
    seen = seen | (index == SINK + RECENT)
    k = _exact(k_sinks, k_ring, k_fresh, slot, b, h, index, seen, KV_HEADS, D, SINK, RECENT)
    scores = tl.dot(queries, tl.trans(k.to(queries.dtype)), input_precision=PRECISION) * (scale * LOG2E)
    scores = tl.where(seen[None, :], scores, float("-inf"))
    top = tl.max(scores, 1)
    weights = tl.exp2(scores - tl.where(top == float("-inf"), 0.0, top)[:, None])
    v = _exact(v_sinks, v_ring, v_fresh, slot, b, h, index, seen, KV_HEADS, D, SINK, RECENT).to(queries.dtype)
    far = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    sum_of_weights = tl.sum(weights, 1)
    if EARLY:
        gdc_wait()
    _leave(part_top, part_total, part, top, sum_of_weights, PARTS)
    _leave_values(part_far, part, sum_of_weights, far, 0, D)


@triton.jit
def attend(
    query, turned, factors, lifts, offsets, starts, slots, pages,
    k_codes, k_scales, k_dims, k_table, k_sinks, k_ring, k_fresh,
    v_codes, v_scales, v_dims, v_table, v_sinks, v_ring, v_fresh,
    part_top, part_total, part_far, scale, pages_per_slot, query_stride_b, query_stride_h,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SINK: tl.constexpr,
    RECENT: tl.constexpr, BEHIND: tl.constexpr, K_KIND: tl.constexpr, V_KIND: tl.constexpr, K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr, HAS_MEAN: tl.constexpr, SPLITS: tl.constexpr, WINDOWS: tl.constexpr,
    CHUNKS: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr, ASM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (SPLITS + WINDOWS, B * KV_HEADS). Positions below start - BEHIND + SINK ... are in pages; see ``Side``."""
    index, b, h = tl.program_id(0), tl.program_id(1) // KV_HEADS, tl.program_id(1) % KV_HEADS
    part = tl.program_id(1) * (SPLITS + WINDOWS) + index
    if index < SPLITS:
        _pages(
            turned, factors, lifts, offsets, starts, pages, k_codes, k_scales, k_dims, k_table, v_codes, v_scales,
            v_dims, v_table, part_top, part_total, part_far, index, part, b, h, pages_per_slot,
            HEADS, KV_HEADS, GROUP, D, BEHIND, K_KIND, V_KIND, K_WIDTH, V_WIDTH, HAS_MEAN, SPLITS, SPLITS + WINDOWS,
            CHUNKS, STAGES, EARLY, ASM, PRECISION,
        )  # fmt: skip
    else:
        _windows(
            query, starts, slots, k_sinks, k_ring, k_fresh, v_sinks, v_ring, v_fresh, part_top, part_total, part_far,
            index - SPLITS, part, b, h, scale, query_stride_b, query_stride_h,
            KV_HEADS, GROUP, D, SINK, RECENT, SPLITS + WINDOWS, EARLY, ASM, PRECISION,
        )  # fmt: skip
