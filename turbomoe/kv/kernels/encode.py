"""Triton: the best path through a trellis for each vector, two vectors a thread; see ``kv/trellis_fixed.py``.

All costs of a thread's vectors are its registers, two in each, and the codebook is immediate operands: nothing is
exchanged between threads. What the minima of a step (``encode_step.py``) drop goes to a scratch area, bit by bit, and
is read again from the last step to the first.
"""

# Triton's language has no types, and no unpacking in tuples.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,no-any-return"
# ruff: noqa: RUF005
from __future__ import annotations

import triton
import triton.language as tl

from turbomoe.kv.kernels import encode_assembly
from turbomoe.kv.kernels.encode_step import assembled, limited, of, renewed, start, step_over
from turbomoe.kv.trellis_search import HALF_SPAN as _HALF_SPAN

VECTORS = 2 * encode_assembly.THREADS  # of a program
_N, HALF_SPAN = tl.constexpr(encode_assembly.THREADS), tl.constexpr(_HALF_SPAN)


@triton.jit
def _first_least(costs, NAME: tl.constexpr):
    """The first groups without costs, which ``renewed`` leaves: of the first vectors and of the second."""
    a, b = tl.zeros((_N,), tl.int32), tl.zeros((_N,), tl.int32)
    for j in tl.static_range(of(NAME, "groups") - 1, -1, -1):
        a = tl.where((costs[j] & 0xFFFF) >> of(NAME, "step_bits") == 0, j, a)
        b = tl.where(costs[j] >> 16 + of(NAME, "step_bits") == 0, j, b)
    return a, b


@triton.jit
def _words(kept, NAME: tl.constexpr, ASM: tl.constexpr):
    """All that ``step_over`` left there: no load waits for the bits of another."""
    if ASM:
        return assembled([kept + tl.arange(0, _N)], NAME, "load", of(NAME, "words"), False)
    else:
        words = ()
        for k in tl.static_range(of(NAME, "words")):
            words = words + (tl.load(kept + k * _N + tl.arange(0, _N)).to(tl.uint32, bitcast=True),)
        return words


@triton.jit
def _before(words, group, high: tl.constexpr, NAME: tl.constexpr):
    """The states that lead to these groups, from what was kept: of the first vectors or, ``high``, of the second."""
    KB: tl.constexpr = of(NAME, "step_bits")
    EACH: tl.constexpr = of(NAME, "each")
    APART: tl.constexpr = of(NAME, "groups") >> KB
    place = (group % APART << KB) + group // APART
    # By halves of the words that are left: fewer choices than there are words.
    for level in tl.static_range(5):
        half = ()
        for k in tl.static_range((len(words) + 1) // 2):
            if 2 * k + 1 < len(words):
                half = half + (tl.where((place // EACH >> level) & 1 != 0, words[2 * k + 1], words[2 * k]),)
            else:
                half = half + (words[2 * k],)
        words = half
    shift = place % EACH * KB + 16 * high
    return (group << KB) | ((words[0] >> shift.to(tl.uint32)) & (1 << KB) - 1).to(tl.int32)


@triton.jit
def _boundary(costs, kept, NAME: tl.constexpr, ASM: tl.constexpr):
    """Both states after half of the 2 * HALF_SPAN steps, on the paths that end in the least of ``costs``."""
    a, b = _first_least(costs, NAME)
    for back in range(HALF_SPAN + 1):
        words = _words(kept + (2 * HALF_SPAN - 1 - back) * (of(NAME, "words") * _N), NAME, ASM)
        a, b = _before(words, a % of(NAME, "groups"), False, NAME), _before(words, b % of(NAME, "groups"), True, NAME)
    return a, b


@triton.jit
def _placed(bits, at, KB: tl.constexpr):
    """KB bits from bit ``at`` of a word on, as far as they lie in it."""
    high = tl.where((at >= 0) & (at < 32), bits << (at & 31), 0)
    return high | tl.where((at < 0) & (at > -KB), bits >> (-at & 31), 0)


@triton.jit
def _stored(bits, step, word: tl.constexpr, NAME: tl.constexpr):
    """What this step of a group puts into this of its words: where steps have two values, their bits lie in planes."""
    KB: tl.constexpr = of(NAME, "step_bits")
    if of(NAME, "values") == 2:
        return ((bits >> word) & 1) << step
    else:
        return _placed(bits, step * KB - 32 * word, KB)


@triton.jit
def _joined(stream, state, step, NAME: tl.constexpr):
    """The words of a group of steps with the bits of one of them, in the order of ``windows.to_planes``."""
    MASK: tl.constexpr = (1 << of(NAME, "step_bits")) - 1
    joined = ()
    for w in tl.static_range(of(NAME, "stream_words")):
        joined = joined + (stream[w] | _stored(state & MASK, step, w, NAME),)
    return joined


@triton.jit
def _squares(table, state, NAME: tl.constexpr):
    value = tl.load(table + state)
    total = value * value
    if of(NAME, "values") == 2:
        value = tl.load(table + (of(NAME, "groups") << of(NAME, "step_bits")) + state)
        total += value * value
    return total


@triton.jit
def _write(codes, table, squares, kept, last_a, last_b, row, n, STEPS, NAME: tl.constexpr, ASM: tl.constexpr):
    """The codes of the paths that end in these states, of vectors ``row`` and the next, by planes of words; and their
    sums of squares.
    """
    WORDS: tl.constexpr = of(NAME, "stream_words")
    EACH: tl.constexpr = 32 * WORDS // of(NAME, "step_bits")
    G: tl.constexpr = of(NAME, "groups")
    RUNS = STEPS // EACH
    a, b = last_a, last_b
    sum_a, sum_b = tl.zeros((_N,), tl.float32), tl.zeros((_N,), tl.float32)
    for run in range(RUNS):
        at = RUNS - 1 - run
        stream_a, stream_b = (), ()
        for _ in tl.static_range(WORDS):
            stream_a, stream_b = stream_a + (tl.zeros((_N,), tl.int32),), stream_b + (tl.zeros((_N,), tl.int32),)
        for part in range(EACH // 4):
            # Four at once: their loads overlap.
            for back in tl.static_range(4):
                step = EACH - 1 - 4 * part - back
                i = at * EACH + step
                words = _words(kept + i * (of(NAME, "words") * _N), NAME, ASM)
                a, b = _before(words, a % G, False, NAME), _before(words, b % G, True, NAME)
                a, b = tl.where(i == STEPS - 1, last_a, a), tl.where(i == STEPS - 1, last_b, b)
                sum_a, sum_b = sum_a + _squares(table, a, NAME), sum_b + _squares(table, b, NAME)
                stream_a, stream_b = _joined(stream_a, a, step, NAME), _joined(stream_b, b, step, NAME)
        for w in tl.static_range(WORDS):
            where = codes + row * (RUNS * WORDS) + w * RUNS + at
            tl.store(where, stream_a[w], mask=row < n)
            tl.store(where + RUNS * WORDS, stream_b[w], mask=row + 1 < n)
    tl.store(squares + row, sum_a, mask=row < n)
    tl.store(squares + row + 1, sum_b, mask=row + 1 < n)


@triton.jit
def _pair(x, i, pair, stride, STEPS, NAME: tl.constexpr):
    """What step i reads, uint32 [N] twice: the same, if it has but one value."""
    at = x + (i % STEPS * of(NAME, "values")).to(tl.int64) * stride + pair
    first = tl.load(at).to(tl.uint32, bitcast=True)
    second = first
    if of(NAME, "values") == 2:
        second = tl.load(at + stride).to(tl.uint32, bitcast=True)
    return first, second


@triton.jit(do_not_specialize=["first", "n"])
def search(
    x, table, scratch, codes, squares, first, n, stride, STEPS, NAME: tl.constexpr, VERSION: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Codes of vectors from number ``first`` on, below n: int32 ``x`` [STEPS * values, stride], a pair of float16 each.

    ``first`` is even, stride a multiple of 32, STEPS of those whose bits are ``group_words`` words. Leaves ``codes``
    int32 [n, STEPS * step_bits / 32], in the order of ``windows.to_planes``, and in ``squares`` float32 [n] the sum of
    the squares of their values, which ``table`` float32 [values, states] holds. ``scratch`` is int32, for each of these
    pairs a word of every step and word of ``encode_assembly.Kept``. VERSION is that of the assembly.
    """
    ROW: tl.constexpr = of(NAME, "words") * _N
    EVERY: tl.constexpr = of(NAME, "renewed")
    pair = first // 2 + tl.program_id(0) * _N + tl.arange(0, _N)
    kept = scratch + tl.program_id(0).to(tl.int64) * (tl.maximum(STEPS, 2 * HALF_SPAN) * ROW)
    a, b = tl.full((_N,), -1, tl.int32), tl.full((_N,), -1, tl.int32)
    # The steps around the boundary, from anywhere; then all, from the boundary.
    for phase in range(2):
        begin = tl.where(phase == 0, STEPS - HALF_SPAN, 0)
        costs = start(a >> of(NAME, "step_bits"), b >> of(NAME, "step_bits"), NAME, ASM)
        now, beside = _pair(x, begin, pair, stride, STEPS, NAME)
        for block in range(tl.where(phase == 0, 2 * HALF_SPAN, STEPS) // EVERY):
            for i in range(block * EVERY, block * EVERY + EVERY):
                # Loaded a step ahead: so small a load is waited for.
                later, later_beside = _pair(x, begin + i + 1, pair, stride, STEPS, NAME)
                costs = step_over(costs, now, beside, kept + i * ROW, NAME, ASM)
                now, beside = later, later_beside
            costs = renewed(costs, NAME, ASM)
            if of(NAME, "limited") > 0:  # noqa: SIM102 - the outer one is decided by the compiler
                if block * EVERY < of(NAME, "limited"):
                    costs = limited(costs, NAME, ASM)
        if phase == 0:
            a, b = _boundary(costs, kept, NAME, ASM)
    _write(codes, table, squares, kept, a, b, 2 * pair.to(tl.int64), n, STEPS, NAME, ASM)
