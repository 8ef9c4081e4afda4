"""Triton: attention of one new token a sequence over exact windows and pages of codes, in four launches.

``prepare`` turns the queries into the domain of the keys' codes; ``attend`` runs one program for each KV head and
part of the context, all queries of the head together; ``merge`` sums the parts, ``finish`` turns what came from codes
back and stores the new token in the windows. Lengths and page tables are read on the device and the grid depends on
sizes that never change, so a CUDA graph may hold the launches. The reference is ``kv/decode.py``, with the same rule of
windows.

EARLY: the first three let their successors start, and the last three read what their predecessors do not write before
they wait for them. All their programs wait, so that a kernel has ended only after those before it. ``prepare`` itself
must start in order: what is read early (codes, page tables, windows) was written by who knows what before it.

Parts [0, splits) read pages, the rest the windows. A part leaves the running maximum and sum of its softmax, in units
of log2, and its weighted values. Values' scales are folded into the weights, and the maximum is taken over the
products: so the weights, in half precision, lie in [0, 1] and near 1 where it matters.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from turbomoe.kv.kernels.codes import (
    OFFSETS,
    UNITS,
    are_bytes,
    decoded,
    lookup,
    of_kind,
    row_order,
    vectors,
    words,
)

PAGE = tl.constexpr(64)
QUERIES = tl.constexpr(16)  # the queries of a KV head, filled up
LOG2E = tl.constexpr(1.4426950408889634)
LARGEST_QUERY = tl.constexpr(127 * 128)  # of one in two bytes
SMALLEST_SCALE = tl.constexpr(2.0**-24)  # of fp16; a scale of 0 is cut to it and its weight to 0


@triton.jit
def butterflies(x, D: tl.constexpr):
    """The Walsh-Hadamard transform of x [D], as ``hadamard.hadamard`` but without its norm."""
    ROUNDS: tl.constexpr = 3 + (D > 8) + (D > 16) + (D > 32) + (D > 64) + (D > 128) + (D > 256)
    for _ in tl.static_range(ROUNDS):
        a, b = tl.split(tl.permute(tl.reshape(x, (2, D // 2)), (1, 0)))
        x = tl.reshape(tl.join(a + b, a - b), (D,))
    return x


@triton.jit
def prepare(
    query, turned, factors, lifts, offsets, columns, signs, mean, spread, turns, scale, query_stride_b,
    query_stride_h, pages_per_slot,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, K_KIND: tl.constexpr, ROTATED: tl.constexpr,
    HAS_MEAN: tl.constexpr, HAS_SPREAD: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (B * HEADS, 1 + blocks of 16 pages). The first column turns a query: float16 ``turned`` of largest
    magnitude 1, its dims in these columns, and its factor. The others find its scores with the means of 16 pages each
    (``turns.page_scores``).

    For keys in bytes a query is integers up to LARGEST_QUERY: int8 ``turned`` [B * HEADS, 2, D], multiples of 128 and
    the rest; and ``lifts`` int32 is what the keys' offset adds to its scores.

    PAIRS channels turn with as many others; HALF is the power of two that holds them.
    """
    if EARLY:
        gdc_launch_dependents()
    row = tl.program_id(0)
    head = row % HEADS // GROUP
    place = query + row // HEADS * query_stride_b + row % HEADS * query_stride_h
    d = tl.arange(0, D)
    x = tl.load(place + d).to(tl.float32)
    if tl.program_id(1) == 0:
        if HAS_SPREAD:
            x = x * tl.load(spread + head * D + d)
        if ROTATED:
            x = butterflies(x * tl.load(signs + d), D)
        top = tl.max(tl.abs(x), 0)
        safe = tl.where(top > 0, top, 1.0)
        column = tl.load(columns + d)
        if are_bytes(K_KIND, OFFSETS):
            whole = tl.floor(x / safe * LARGEST_QUERY + 0.5).to(tl.int32)
            high = (whole + 64) >> 7
            tl.store(turned + 2 * row * D + column, high.to(tl.int8))
            tl.store(turned + (2 * row + 1) * D + column, (whole - high * 128).to(tl.int8))
            tl.store(lifts + row, tl.sum(whole, 0) * of_kind(K_KIND, OFFSETS))
            tl.store(factors + row, safe * scale * (LOG2E * of_kind(K_KIND, UNITS) / 2 / LARGEST_QUERY))
        else:
            tl.store(turned + row * D + column, (x / safe).to(tl.float16))
            tl.store(factors + row, safe * scale * LOG2E)
    elif HAS_MEAN:
        page = (tl.program_id(1) - 1) * 16 + tl.arange(0, 16)
        still = tl.sum(tl.where(d >= 2 * PAIRS, x * tl.load(mean + head * D + d), 0.0), 0)
        found = tl.zeros((16,), tl.float32) + still
        if PAIRS > 0:
            i = tl.arange(0, HALF)
            first, second = (i < PAIRS), PAIRS + i
            qa, qb = tl.load(place + i, mask=first, other=0.0), tl.load(place + second, mask=first, other=0.0)
            qa, qb = qa.to(tl.float32), qb.to(tl.float32)
            a = tl.load(mean + head * D + i, mask=first, other=0.0)
            b = tl.load(mean + head * D + second, mask=first, other=0.0)
            inside = (page < pages_per_slot)[:, None] & first[None, :]
            at = turns + page[:, None] * (2 * PAIRS)
            cos = tl.load(at + i[None, :], mask=inside, other=0.0)
            sin = tl.load(at + second[None, :], mask=inside, other=0.0)
            found += tl.sum(cos * (qa * a + qb * b)[None, :] + sin * (qb * a - qa * b)[None, :], 1)
        tl.store(offsets + row * pages_per_slot + page, found * scale * LOG2E, mask=page < pages_per_slot)


@triton.jit
def tiles_each(tiles, SPLITS: tl.constexpr):
    """Tiles of a part."""
    return tl.maximum(tl.cdiv(tiles, SPLITS), 1)


@triton.jit
def _tile(
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
    """``_tile`` of these vectors, from ``_words`` where they are held."""
    if AHEAD:
        return decoded(held, tables, KIND, FOR_SCORES)
    else:
        return _tile(codes, scales, first, seen, dims, table, D, KIND, WIDTH, CHUNK, CHUNKS, FOR_SCORES, ASM)


@triton.jit
def _scales(scales, page, h, KV_HEADS: tl.constexpr, SCALED: tl.constexpr):
    """The scales of a page's vectors, in the order of ``_tile``: float16 [64]; ones for kinds without."""
    n = tl.arange(0, PAGE)
    if SCALED:
        return tl.load(scales + (page * KV_HEADS + h) * PAGE + row_order(n))
    else:
        return tl.full((PAGE,), 1.0, tl.float16)


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
    k_scale, v_scale = _scales(k_scales, page, h, KV_HEADS, K_SCALED), _scales(v_scales, page, h, KV_HEADS, V_SCALED)
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
        next_k_scale = _scales(k_scales, next_page, h, KV_HEADS, K_SCALED)
        next_v_scale = _scales(v_scales, next_page, h, KV_HEADS, V_SCALED)
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


@triton.jit
def _weights(tops, totals, part, inside, top):
    """Shares of a query's parts, relative to the maximum ``top``: float32."""
    weight = tl.exp2(tl.load(tops + part, mask=inside, other=float("-inf")) - top)
    return weight * tl.load(totals + part, mask=inside, other=0.0)


@triton.jit
def merge(
    sums, totals, part_top, part_total, part_far, starts,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BEHIND: tl.constexpr,
    SPLITS: tl.constexpr, WINDOWS: tl.constexpr, PARTS: tl.constexpr, WINDOW_ROWS: tl.constexpr, EARLY: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid (B * HEADS, D / COLUMNS): the parts of a query head together.

    sums [2, B * HEADS, D]: values from codes, in the order of their columns, and from windows; totals [2, B * HEADS]:
    the sums of weights from codes, and of all.
    """
    if EARLY:
        gdc_launch_dependents()
    program, rows = tl.program_id(0), tl.num_programs(0)
    b, head = program // HEADS, program % HEADS
    group, query = b * KV_HEADS + head // GROUP, head % GROUP
    of_query = (group * QUERIES + query) * (SPLITS + WINDOWS)
    tops, totals_of_parts = part_top + of_query, part_total + of_query
    values = part_far + (group * (SPLITS + WINDOWS) * QUERIES + query) * D
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    tiles = tl.cdiv(tl.maximum(tl.load(starts + b) - BEHIND, 0), PAGE)
    used = tl.minimum(tl.cdiv(tiles, tiles_each(tiles, SPLITS)), SPLITS)
    if EARLY:
        gdc_wait()
    p = tl.arange(0, PARTS)
    top = tl.max(tl.load(tops + p, mask=p < SPLITS + WINDOWS, other=float("-inf")), 0)
    total, coded = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK, COLUMNS), tl.float32)
    for first in tl.range(0, used, BLOCK, num_stages=2):
        part = first + tl.arange(0, BLOCK)
        place = values + part[:, None] * (QUERIES * D) + column[None, :]
        far = tl.load(place, mask=(part < used)[:, None], other=0.0)
        weight = _weights(tops, totals_of_parts, part, part < used, top)
        total += weight
        coded += weight[:, None] * far.to(tl.float32)
    coded_total = tl.sum(total, 0)
    tl.store(sums + program * D + column, tl.sum(coded, 0))
    if WINDOWS > 0:
        part = SPLITS + tl.arange(0, WINDOW_ROWS)
        place = values + part[:, None] * (QUERIES * D) + column[None, :]
        far = tl.load(place, mask=(part < SPLITS + WINDOWS)[:, None], other=0.0)
        weight = _weights(tops, totals_of_parts, part, part < SPLITS + WINDOWS, top)
        tl.store(sums + (rows + program) * D + column, tl.sum(weight[:, None] * far.to(tl.float32), 0))
        total_of_windows = tl.sum(weight, 0)
    else:
        tl.store(sums + (rows + program) * D + column, tl.zeros((COLUMNS,), tl.float32))
        total_of_windows = 0.0
    if tl.program_id(1) == 0:
        tl.store(totals + program, coded_total)
        tl.store(totals + rows + program, coded_total + total_of_windows)


@triton.jit
def finish(
    out, sums, totals, v_columns, starts, slots, signs, mean, k_sinks, k_ring, k_fresh, v_sinks, v_ring, v_fresh,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SINK: tl.constexpr,
    RECENT: tl.constexpr, ROTATED: tl.constexpr, HAS_MEAN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One query head a program: float32 out [B, HEADS, D]. The first of a group also stores the new token."""
    program, rows, d = tl.program_id(0), tl.num_programs(0), tl.arange(0, D)
    b, head = program // HEADS, program % HEADS
    h, query = head // GROUP, head % GROUP
    order, sign = tl.load(v_columns + d), tl.load(signs + d)
    if EARLY:
        gdc_wait()
    coded = tl.load(sums + program * D + order)
    plain = tl.load(sums + (rows + program) * D + d)
    if ROTATED:
        coded = butterflies(coded, D) * sign
    if HAS_MEAN:
        coded += tl.load(totals + program) * tl.load(mean + h * D + d)
    tl.store(out + program * D + d, (coded + plain) / tl.load(totals + rows + program))
    if query == 0 and SINK + RECENT > 0:
        start, slot = tl.load(starts + b), tl.load(slots + b)
        k = tl.load(k_fresh + (b * KV_HEADS + h) * D + d)
        v = tl.load(v_fresh + (b * KV_HEADS + h) * D + d)
        if SINK > 0:
            at = ((slot * KV_HEADS + h) * SINK + tl.minimum(start, SINK - 1)) * D + d
            tl.store(k_sinks + at, k, mask=start < SINK)
            tl.store(v_sinks + at, v, mask=start < SINK)
        if RECENT > 0:
            at = ((slot * KV_HEADS + h) * RECENT + start % RECENT) * D + d
            tl.store(k_ring + at, k)
            tl.store(v_ring + at, v)
