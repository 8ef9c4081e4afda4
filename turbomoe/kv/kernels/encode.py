"""Triton: the best path through a trellis for each vector, two vectors a thread; see ``kv/trellis_fixed.py``.

All costs of a thread's vectors are its registers, two in each, and the codebook is immediate operands: nothing is
exchanged between threads. A step is one block of assembly (``encode_assembly.py``), with a plain twin here. What the
minima drop goes to a scratch area, bit by bit, and is read again from the last step to the first.
"""

# Triton's language has no types, and no unpacking in tuples.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,no-any-return"
# ruff: noqa: RUF005
from __future__ import annotations

import triton
import triton.language as tl

from turbomoe.kv import trellis_fixed
from turbomoe.kv.kernels import encode_assembly
from turbomoe.kv.trellis_codebook import TRELLISES
from turbomoe.kv.trellis_search import HALF_SPAN as _HALF_SPAN

VECTORS = 2 * encode_assembly.THREADS  # of a program
_N = tl.constexpr(encode_assembly.THREADS)
UNREACHABLE, HALF_SPAN = tl.constexpr(trellis_fixed.UNREACHABLE), tl.constexpr(_HALF_SPAN)
BOTH = tl.constexpr(0x00010001)  # times a number: the number in both halves
PLANS = {name: encode_assembly.plan(trellis) for name, trellis in TRELLISES.items()}


@triton.constexpr_function
def _of(name, field):
    return getattr(PLANS[name], field)


@triton.constexpr_function
def _entry(name, field, index):
    return getattr(PLANS[name], field)[index]


@triton.constexpr_function
def _level(name, value, number):
    return PLANS[name].levels[value][number]


@triton.constexpr_function
def _number(name, value, state):
    return PLANS[name].numbers[value][state]


@triton.constexpr_function
def _state(name, place, bits):
    return (PLANS[name].group_of[place] << PLANS[name].step_bits) + bits


@triton.constexpr_function
def _level_count(name, value):
    return len(PLANS[name].levels[value])


@triton.constexpr_function
def _so_many(many):
    return (tl.uint32,) * many


@triton.jit
def _half_distances(x, NAME: tl.constexpr, value: tl.constexpr):
    """The twin of the PTX for one half: uint32 for every level of this value of a step, from the bits of x."""
    BASE: tl.constexpr = _of(NAME, "base")
    base = tl.full((_N,), BASE, tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    found = ()
    for number in tl.static_range(_level_count(NAME, value)):
        e = x.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) - _level(NAME, value, number)
        e = e.to(tl.float16).to(tl.float32)
        pattern = tl.minimum(e * e + base, 1.0).to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
        found = found + ((pattern - BASE) << _of(NAME, "step_bits"),)
    return found


@triton.jit
def _distances(x, NAME: tl.constexpr, value: tl.constexpr):
    low, high = _half_distances(x & 0xFFFF, NAME, value), _half_distances(x >> 16, NAME, value)
    both = ()
    for number in tl.static_range(len(low)):
        both = both + (low[number] | (high[number] << 16),)
    return both


@triton.jit
def _lesser(a, b):
    """Half by half."""
    return tl.minimum(a & 0xFFFF, b & 0xFFFF) | (tl.minimum(a >> 16, b >> 16) << 16)


@triton.jit
def _plain_step(costs, x, y, kept, NAME: tl.constexpr):
    """The twin of ``encode_assembly.step``."""
    KB: tl.constexpr = _of(NAME, "step_bits")
    G: tl.constexpr = _of(NAME, "groups")
    EACH: tl.constexpr = _of(NAME, "each")
    first = _distances(x, NAME, 0)
    second = _distances(y, NAME, _of(NAME, "values") - 1)
    found = ()
    word = tl.zeros((_N,), tl.uint32)
    for place in tl.static_range(G):
        least = tl.full((_N,), 0xFFFFFFFF, tl.uint32)
        for bits in tl.static_range(1 << KB):
            cost = costs[_state(NAME, place, bits) % G] + first[_number(NAME, 0, _state(NAME, place, bits))]
            if _of(NAME, "values") == 2:
                cost += second[_number(NAME, 1, _state(NAME, place, bits))]
            least = _lesser(least, cost)
        dropped = least & ((1 << KB) - 1) * BOTH
        if place % EACH == 0:
            word = dropped
        else:
            word = word | (dropped << place % EACH * KB)
        if place % EACH == EACH - 1 or place == G - 1:
            tl.store(kept + place // EACH * _N + tl.arange(0, _N), word.to(tl.int32, bitcast=True))
        found = found + ((least - dropped) | _entry(NAME, "group_of", place) % (1 << KB) * BOTH,)
    by_group = ()
    for j in tl.static_range(G):
        by_group = by_group + (found[_entry(NAME, "place_of", j)],)
    return by_group


@triton.jit
def _step(costs, x, y, kept, NAME: tl.constexpr, ASM: tl.constexpr):
    """Least costs of all groups after a step over x (and y), two halves in uint32 [N] each; what they drop goes to
    ``kept``.

    State s comes from group s % G and goes to group s >> step_bits. The lowest bits of a cost are those of its group, so
    that they say in a minimum where it came from.
    """
    if ASM:
        at = kept + tl.arange(0, _N)
        if _of(NAME, "values") == 2:
            return tl.inline_asm_elementwise(
                _entry(NAME, "step", 0), _entry(NAME, "step", 1), costs + (x, y, at), dtype=_so_many(_of(NAME, "groups")),
                is_pure=False, pack=1,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                _entry(NAME, "step", 0), _entry(NAME, "step", 1), costs + (x, at), dtype=_so_many(_of(NAME, "groups")),
                is_pure=False, pack=1,
            )  # fmt: skip
    else:
        return _plain_step(costs, x, y, kept, NAME)


@triton.jit
def _renewed(costs, NAME: tl.constexpr, ASM: tl.constexpr):
    """Costs less the least of all groups, but for their lowest bits."""
    if ASM:
        return tl.inline_asm_elementwise(
            _entry(NAME, "renewal", 0), _entry(NAME, "renewal", 1), costs, dtype=_so_many(_of(NAME, "groups")), is_pure=True, pack=1
        )
    else:
        least = costs[0]
        for j in tl.static_range(1, _of(NAME, "groups")):
            least = _lesser(least, costs[j])
        least = least & (0x10000 - (1 << _of(NAME, "step_bits"))) * BOTH
        less = ()
        for j in tl.static_range(_of(NAME, "groups")):
            less = less + (costs[j] - least,)
        return less


@triton.jit
def _named(cost, own: tl.constexpr, ASM: tl.constexpr):
    """Costs with these lowest bits. From assembly: of other numbers the compiler studies the divisors, for minutes."""
    if ASM:
        return tl.inline_asm_elementwise("or.b32 $0, $1, $2;", "=r,r,n", [cost, own * BOTH], dtype=tl.uint32,
                                         is_pure=True, pack=1)  # fmt: skip
    else:
        return cost | own * BOTH


@triton.jit
def _start(group_a, group_b, NAME: tl.constexpr, ASM: tl.constexpr):
    """Costs before a pass: none in these groups, or in any if they are negative."""
    costs = ()
    for j in tl.static_range(_of(NAME, "groups")):
        a = tl.where((group_a == j) | (group_a < 0), 0, UNREACHABLE).to(tl.uint32)
        b = tl.where((group_b == j) | (group_b < 0), 0, UNREACHABLE).to(tl.uint32)
        costs = costs + (_named(a | (b << 16), j % (1 << _of(NAME, "step_bits")), ASM),)
    return costs


@triton.jit
def _first_least(costs, NAME: tl.constexpr):
    """The first groups without costs, which ``_renewed`` leaves: of the first vectors and of the second."""
    a, b = tl.zeros((_N,), tl.int32), tl.zeros((_N,), tl.int32)
    for j in tl.static_range(_of(NAME, "groups") - 1, -1, -1):
        a = tl.where((costs[j] & 0xFFFF) >> _of(NAME, "step_bits") == 0, j, a)
        b = tl.where(costs[j] >> 16 + _of(NAME, "step_bits") == 0, j, b)
    return a, b


@triton.jit
def _words(kept, NAME: tl.constexpr, ASM: tl.constexpr):
    """All that ``_step`` left there: no load waits for the bits of another."""
    if ASM:
        return tl.inline_asm_elementwise(
            _entry(NAME, "load", 0), _entry(NAME, "load", 1), [kept + tl.arange(0, _N)], dtype=_so_many(_of(NAME, "words")),
            is_pure=False, pack=1,
        )  # fmt: skip
    else:
        words = ()
        for k in tl.static_range(_of(NAME, "words")):
            words = words + (tl.load(kept + k * _N + tl.arange(0, _N)).to(tl.uint32, bitcast=True),)
        return words


@triton.jit
def _before(words, group, high: tl.constexpr, NAME: tl.constexpr):
    """The states that lead to these groups, from what was kept: of the first vectors or, ``high``, of the second."""
    KB: tl.constexpr = _of(NAME, "step_bits")
    EACH: tl.constexpr = _of(NAME, "each")
    APART: tl.constexpr = _of(NAME, "groups") >> KB
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
        words = _words(kept + (2 * HALF_SPAN - 1 - back) * (_of(NAME, "words") * _N), NAME, ASM)
        a, b = _before(words, a % _of(NAME, "groups"), False, NAME), _before(words, b % _of(NAME, "groups"), True, NAME)
    return a, b


@triton.jit
def _placed(bits, at, KB: tl.constexpr):
    """KB bits from bit ``at`` of a word on, as far as they lie in it."""
    high = tl.where((at >= 0) & (at < 32), bits << (at & 31), 0)
    return high | tl.where((at < 0) & (at > -KB), bits >> (-at & 31), 0)


@triton.jit
def _joined(stream, state, step, NAME: tl.constexpr):
    """The words of a group of steps with the bits of one of them, in the order of ``windows.pack_steps``."""
    KB: tl.constexpr = _of(NAME, "step_bits")
    joined = ()
    for w in tl.static_range(_of(NAME, "stream_words")):
        joined = joined + (stream[w] | _placed(state & (1 << KB) - 1, step * KB - 32 * w, KB),)
    return joined


@triton.jit
def _squares(table, state, NAME: tl.constexpr):
    value = tl.load(table + state)
    total = value * value
    if _of(NAME, "values") == 2:
        value = tl.load(table + (_of(NAME, "groups") << _of(NAME, "step_bits")) + state)
        total += value * value
    return total


@triton.jit
def _write(codes, table, squares, kept, last_a, last_b, row, n, STEPS, NAME: tl.constexpr, ASM: tl.constexpr):
    """The codes of the paths that end in these states, of vectors ``row`` and the next, by planes of words; and their
    sums of squares.
    """
    WORDS: tl.constexpr = _of(NAME, "stream_words")
    EACH: tl.constexpr = 32 * WORDS // _of(NAME, "step_bits")
    G: tl.constexpr = _of(NAME, "groups")
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
                words = _words(kept + i * (_of(NAME, "words") * _N), NAME, ASM)
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
    at = x + (i % STEPS * _of(NAME, "values")).to(tl.int64) * stride + pair
    first = tl.load(at).to(tl.uint32, bitcast=True)
    second = first
    if _of(NAME, "values") == 2:
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
    ROW: tl.constexpr = _of(NAME, "words") * _N
    EVERY: tl.constexpr = _of(NAME, "renewed")
    pair = first // 2 + tl.program_id(0) * _N + tl.arange(0, _N)
    kept = scratch + tl.program_id(0).to(tl.int64) * (tl.maximum(STEPS, 2 * HALF_SPAN) * ROW)
    a, b = tl.full((_N,), -1, tl.int32), tl.full((_N,), -1, tl.int32)
    # The steps around the boundary, from anywhere; then all, from the boundary.
    for phase in range(2):
        begin = tl.where(phase == 0, STEPS - HALF_SPAN, 0)
        costs = _start(a >> _of(NAME, "step_bits"), b >> _of(NAME, "step_bits"), NAME, ASM)
        now, beside = _pair(x, begin, pair, stride, STEPS, NAME)
        for block in range(tl.where(phase == 0, 2 * HALF_SPAN, STEPS) // EVERY):
            for i in range(block * EVERY, block * EVERY + EVERY):
                # Loaded a step ahead: so small a load is waited for.
                later, later_beside = _pair(x, begin + i + 1, pair, stride, STEPS, NAME)
                costs = _step(costs, now, beside, kept + i * ROW, NAME, ASM)
                now, beside = later, later_beside
            costs = _renewed(costs, NAME, ASM)
        if phase == 0:
            a, b = _boundary(costs, kept, NAME, ASM)
    _write(codes, table, squares, kept, a, b, 2 * pair.to(tl.int64), n, STEPS, NAME, ASM)
