"""Triton: attention of one new token a sequence over exact windows and pages of codes, in four launches.

``prepare`` turns the queries into the domain of the keys' codes; ``attend`` (``attend.py``) leaves a part of the result
for each part of the context; ``merge`` sums the parts, ``finish`` turns what came from codes back and stores the new
token in the windows. Lengths and page tables are read on the device and the grid depends on
sizes that never change, so a CUDA graph may hold the launches. The reference is ``kv/decode.py``, with the same rule of
windows.

EARLY: the first three let their successors start, and the last three read what their predecessors do not write before
they wait for them. All their programs wait, so that a kernel has ended only after those before it. ``prepare`` itself
must start in order: what is read early (codes, page tables, windows) was written by who knows what before it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from turbomoe.kv.kernels.codes import OFFSETS, UNITS, are_bytes, of_kind
from turbomoe.kv.kernels.tiles import LOG2E, PAGE, QUERIES, tiles_each

LARGEST_QUERY = tl.constexpr(127 * 128)  # of one in two bytes


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
