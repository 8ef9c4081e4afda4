"""Triton: the best path through a trellis for each vector, one thread a vector; see ``kv/trellis_fixed.py``.

All costs of a vector are registers of its thread, and the codebook is immediate operands: a state and step takes one
multiply-add and one fused add and minimum (sm_90), nothing is exchanged between threads, and 32 vectors make a program.
What the minima drop goes to a scratch area, bit by bit, and is read again from the last step to the first. Costs of all
groups that share a predecessor are made one after the other, so their bits stand in that order.
"""

# Triton's language has no types, and no unpacking in tuples.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,no-any-return"
# ruff: noqa: RUF005
from __future__ import annotations

import triton
import triton.language as tl

from turbomoe.kv.trellis_codebook import TRELLISES
from turbomoe.kv.trellis_fixed import START as _START
from turbomoe.kv.trellis_fixed import UNREACHABLE as _UNREACHABLE
from turbomoe.kv.trellis_fixed import fixed
from turbomoe.kv.trellis_search import HALF_SPAN as _HALF_SPAN

VECTORS = 32  # of a program
_N = tl.constexpr(VECTORS)
START, UNREACHABLE, HALF_SPAN = tl.constexpr(_START), tl.constexpr(_UNREACHABLE), tl.constexpr(_HALF_SPAN)
_FIXED = [fixed(TRELLISES[name]) for name in ("tcq2.5", "tcq3", "tcq4")]
SLOPES_25, SLOPES_3, SLOPES_4 = (tl.constexpr(each.slopes) for each in _FIXED)
OFFSETS_25, OFFSETS_3, OFFSETS_4 = (tl.constexpr(each.offsets) for each in _FIXED)


@triton.constexpr_function
def _group(place, many, groups):
    """Which group is made in this place: those that share predecessors follow each other."""
    return place % many * (groups // many) + place // many


@triton.constexpr_function
def _place(group, many, groups):
    """Where this group is made."""
    return group % (groups // many) * many + group // (groups // many)


@triton.constexpr_function
def _text(slopes, offsets, state):
    """PTX: what a step costs in a state, added to a cost, kept if less than another.

    ``min.relu`` is a minimum, as no cost is negative; the assembler makes one instruction of it and the addition, where
    it would turn a chain of plain minima into a tree of more.
    """
    lines = [".reg .s32 p;", f"mad.lo.s32 p, $3, {slopes[0][state]}, {offsets[state]};"]
    if len(slopes) == 2:
        lines.append(f"mad.lo.s32 p, $4, {slopes[1][state]}, p;")
    lines += ["add.s32 p, p, $1;", "min.relu.s32 $0, p, $2;"]
    return "{" + " ".join(lines) + "}"


@triton.constexpr_function
def _slope(slopes, value, state):
    return slopes[value][state]


@triton.constexpr_function
def _offset(offsets, state):
    return offsets[state]


@triton.jit
def _distance(x, y, state: tl.constexpr, SLOPES: tl.constexpr, OFFSETS: tl.constexpr, VALUES: tl.constexpr):
    """What a step over values x (and y) costs in a state, without their squares."""
    total = x * _slope(SLOPES, 0, state) + _offset(OFFSETS, state)
    if VALUES == 2:
        total += y * _slope(SLOPES, 1, state)
    return total


@triton.jit
def _lesser(
    cost, come, x, y, state: tl.constexpr, SLOPES: tl.constexpr, OFFSETS: tl.constexpr, VALUES: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """The lesser of ``cost`` and that of a step to this state from a group of cost ``come``."""
    if ASM:
        if VALUES == 1:
            return tl.inline_asm_elementwise(
                _text(SLOPES, OFFSETS, state), "=r,r,r,r", [come, cost, x], dtype=tl.int32, is_pure=True, pack=1
            )
        else:
            return tl.inline_asm_elementwise(
                _text(SLOPES, OFFSETS, state), "=r,r,r,r,r", [come, cost, x, y], dtype=tl.int32, is_pure=True, pack=1
            )
    else:
        return tl.minimum(cost, come + _distance(x, y, state, SLOPES, OFFSETS, VALUES))


@triton.jit
def _step(
    costs, x, y, kept, SLOPES: tl.constexpr, OFFSETS: tl.constexpr, VALUES: tl.constexpr, KB: tl.constexpr,
    G: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Least costs of all groups after a step over values x (and y), int32 [N] each; what they drop goes to ``kept``.

    State s comes from group s % G and goes to group s >> KB. The lowest bits of a cost are those of its group, so that
    they say in a minimum where it came from.
    """
    MANY: tl.constexpr = 1 << KB
    PER: tl.constexpr = 32 // KB
    found = ()
    word = tl.zeros((_N,), tl.uint32)
    for place in tl.static_range(G):
        least = costs[_group(place, MANY, G) * MANY % G]
        least += _distance(x, y, _group(place, MANY, G) * MANY, SLOPES, OFFSETS, VALUES)
        for bits in tl.static_range(1, MANY):
            least = _lesser(
                least, costs[(_group(place, MANY, G) * MANY + bits) % G], x, y, _group(place, MANY, G) * MANY + bits,
                SLOPES, OFFSETS, VALUES, ASM,
            )  # fmt: skip
        word = (word >> KB) | (least.to(tl.uint32, bitcast=True) << (32 - KB))
        if place % PER == PER - 1 or place == G - 1:
            full = word >> (PER - 1 - place % PER) * KB
            tl.store(kept + place // PER * _N + tl.arange(0, _N), full.to(tl.int32, bitcast=True))
        found = found + (least & -MANY,)
    by_group = ()
    for j in tl.static_range(G):
        by_group = by_group + (found[_place(j, MANY, G)] | j % MANY,)
    return by_group


@triton.jit
def _dropped(kept, group, KB: tl.constexpr, G: tl.constexpr):
    """The bits that ``_step`` left in ``kept`` for these groups.

    All words are read, so that no load waits for another's bits.
    """
    PER: tl.constexpr = 32 // KB
    place = group % (G >> KB) * (1 << KB) + group // (G >> KB)
    word = tl.zeros((_N,), tl.int32)
    for k in tl.static_range((G + PER - 1) // PER):
        word = tl.where(place // PER == k, tl.load(kept + k * _N + tl.arange(0, _N)), word)
    shift = (32 - KB * PER + place % PER * KB).to(tl.uint32)
    return (word.to(tl.uint32, bitcast=True) >> shift).to(tl.int32) & ((1 << KB) - 1)


@triton.jit
def _start(group, KB: tl.constexpr, G: tl.constexpr):
    """Costs before a pass: none in this group, or in any if it is negative."""
    costs = ()
    for j in tl.static_range(G):
        costs = costs + (tl.where((group == j) | (group < 0), START, UNREACHABLE) | j % (1 << KB),)
    return costs


@triton.jit
def _first_least(costs, KB: tl.constexpr, G: tl.constexpr):
    least, group = costs[0], tl.zeros((_N,), tl.int32)
    for j in tl.static_range(1, G):
        cost = costs[j] & -(1 << KB)
        group = tl.where(cost < least, j, group)
        least = tl.minimum(least, cost)
    return group


@triton.jit
def _boundary(costs, kept, ROW: tl.constexpr, KB: tl.constexpr, G: tl.constexpr):
    """The state after half of the 2 * HALF_SPAN steps, on the path that ends in the least of ``costs``."""
    group = _first_least(costs, KB, G)
    state = group
    for back in range(HALF_SPAN + 1):
        state = (group << KB) | _dropped(kept + (2 * HALF_SPAN - 1 - back) * ROW, group, KB, G)
        group = state % G
    return state


@triton.jit
def _placed(bits, at, KB: tl.constexpr):
    """KB bits from bit ``at`` of a word on, as far as they lie in it."""
    high = tl.where((at >= 0) & (at < 32), bits << (at & 31), 0)
    return high | tl.where((at < 0) & (at > -KB), bits >> (-at & 31), 0)


@triton.jit
def _stored(bits, step, word: tl.constexpr, VALUES: tl.constexpr, KB: tl.constexpr):
    """What this step of a group puts into this of its words: where steps have two values, their bits lie in planes."""
    if VALUES == 2:
        return ((bits >> word) & 1) << step
    else:
        return _placed(bits, step * KB - 32 * word, KB)


@triton.jit
def _write(
    codes, table, kept, last, row, inside, STEPS, ROW: tl.constexpr, VALUES: tl.constexpr, KB: tl.constexpr,
    G: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """The code of the path that ends in state ``last``, by planes of words; returns the sum of its squared values."""
    EACH: tl.constexpr = 32 * WORDS // KB
    RUNS = STEPS // EACH
    squares = tl.zeros((_N,), tl.float32)
    group = last
    for run in range(RUNS):
        at = RUNS - 1 - run
        stream = ()
        for _ in tl.static_range(WORDS):
            stream = stream + (tl.zeros((_N,), tl.int32),)
        for part in range(EACH // 4):
            # Four at once: their loads overlap.
            for back in tl.static_range(4):
                step = EACH - 1 - 4 * part - back
                i = at * EACH + step
                state = (group << KB) | _dropped(kept + i * ROW, group, KB, G)
                state = tl.where(i == STEPS - 1, last, state)
                group = state % G
                for v in tl.static_range(VALUES):
                    value = tl.load(table + v * (G << KB) + state)
                    squares += value * value
                joined = ()
                for w in tl.static_range(WORDS):
                    joined = joined + (stream[w] | _stored(state & ((1 << KB) - 1), step, w, VALUES, KB),)
                stream = joined
        for w in tl.static_range(WORDS):
            tl.store(codes + row * (RUNS * WORDS) + w * RUNS + at, stream[w], mask=inside)
    return squares


@triton.jit
def _search(
    x, table, scratch, codes, squares, first, n, stride, STEPS, SLOPES: tl.constexpr, OFFSETS: tl.constexpr,
    VALUES: tl.constexpr, KB: tl.constexpr, G: tl.constexpr, WORDS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    PER: tl.constexpr = 32 // KB
    ROW: tl.constexpr = (G + PER - 1) // PER * _N
    row = (first + tl.program_id(0) * _N + tl.arange(0, _N)).to(tl.int64)
    kept = scratch + tl.program_id(0).to(tl.int64) * (tl.maximum(STEPS, 2 * HALF_SPAN) * ROW)
    state = tl.full((_N,), -1, tl.int32)
    # The steps around the boundary, from anywhere; then all, from the boundary.
    for phase in range(2):
        begin = tl.where(phase == 0, STEPS - HALF_SPAN, 0)
        costs = _start(state >> KB, KB, G)
        a = tl.load(x + (begin * VALUES).to(tl.int64) * stride + row).to(tl.int32)
        b = a
        if VALUES == 2:
            b = tl.load(x + (begin * VALUES + 1).to(tl.int64) * stride + row).to(tl.int32)
        for i in range(tl.where(phase == 0, 2 * HALF_SPAN, STEPS)):
            # Loaded a step ahead: so small a load is waited for.
            at = ((begin + i + 1) % STEPS * VALUES).to(tl.int64) * stride + row
            next_a = tl.load(x + at).to(tl.int32)
            next_b = next_a
            if VALUES == 2:
                next_b = tl.load(x + at + stride).to(tl.int32)
            costs = _step(costs, a, b, kept + i * ROW, SLOPES, OFFSETS, VALUES, KB, G, ASM)
            a, b = next_a, next_b
        if phase == 0:
            state = _boundary(costs, kept, ROW, KB, G)
    total = _write(codes, table, kept, state, row, row < n, STEPS, ROW, VALUES, KB, G, WORDS)
    tl.store(squares + row, total, mask=row < n)


@triton.jit(do_not_specialize=["first", "n"])
def search(
    x, table, scratch, codes, squares, first, n, stride, STEPS, KB: tl.constexpr, G: tl.constexpr, WORDS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """tcq2.5, tcq3 or tcq4 for vectors from number ``first`` on, below n: int16 ``x`` [STEPS * values, stride].

    The stride is a multiple of 32. Leaves ``codes`` int32 [n, STEPS * KB / 32], in the order of ``windows.to_planes``,
    and in ``squares`` float32 [n] the sum of the squares of their values, which ``table`` float32 [values, states]
    holds. ``scratch`` is int32, 13 KB or less for each of these vectors with 256 steps.
    """
    if KB == 3:
        _search(x, table, scratch, codes, squares, first, n, stride, STEPS, SLOPES_3, OFFSETS_3, 1, KB, G, WORDS, ASM)
    elif KB == 4:
        _search(x, table, scratch, codes, squares, first, n, stride, STEPS, SLOPES_4, OFFSETS_4, 1, KB, G, WORDS, ASM)
    else:
        _search(x, table, scratch, codes, squares, first, n, stride, STEPS, SLOPES_25, OFFSETS_25, 2, KB, G, WORDS, ASM)
