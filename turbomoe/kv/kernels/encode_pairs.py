"""Triton: the search of ``encode.py`` with costs of 16 bits, two vectors a thread; see ``kv/trellis_pairs.py``.

Every register holds the costs of two vectors, so one fused add and minimum (sm_90) makes a state and step of both. A
state's distance is one of at most 64, made once a step. What the minima drop fills words of two halves, one a vector.
"""

# Triton's language has no types, and no unpacking in tuples.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,no-any-return"
# ruff: noqa: RUF005
from __future__ import annotations

import triton
import triton.language as tl

from turbomoe.kv import trellis_pairs
from turbomoe.kv.kernels.encode import HALF_SPAN, _first_least, _group, _place
from turbomoe.kv.trellis_codebook import TRELLISES

THREADS = 32  # of a program
VECTORS = 2 * THREADS
GROUPS_A_WORD = 8  # of what is kept
_N = tl.constexpr(THREADS)
UNREACHABLE, RENEWED = tl.constexpr(trellis_pairs.UNREACHABLE), tl.constexpr(trellis_pairs.RENEWED)
BASE, BASE_BITS = tl.constexpr(trellis_pairs.BASE), tl.constexpr(trellis_pairs.BASE_BITS)
LEVELS, NUMBERS = (tl.constexpr(each) for each in trellis_pairs.levels(TRELLISES["tcq2"]))
GROUPS = tl.constexpr(TRELLISES["tcq2"].groups)
BOTH = tl.constexpr(0x00010001)  # times a number: the number in both halves


@triton.constexpr_function
def _distance_text(minus, base_bits):
    """PTX: the distances of two x to a value. No half carries into the other."""
    lines = [
        ".reg .b32 e, v, b;",
        f"mov.b32 v, {minus * 0x10001};",
        f"mov.b32 b, {base_bits * 0x10001};",
        "add.rn.f16x2 e, $1, v;",
        "fma.rn.f16x2 e, e, e, b;",
        f"mad.lo.u32 $0, e, 4, {-4 * base_bits * 0x10001 % (1 << 32)};",
    ]
    return "{" + " ".join(lines) + "}"


@triton.jit
def _half(bits):
    """What the low 16 bits say in half precision, as float32."""
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _half_distance(x, minus: tl.constexpr):
    """The twin of the PTX for one half: uint32, from the bits of x."""
    e = _half(x) + _half(tl.full((_N,), minus, tl.uint32))
    return ((e * e + BASE).to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32) - BASE_BITS) * 4


@triton.jit
def _distances(x, LEVELS: tl.constexpr, ASM: tl.constexpr):
    """Of two float16 in each uint32 to every value, in halves alike."""
    found = ()
    for number in tl.static_range(len(LEVELS)):
        if ASM:
            distance = tl.inline_asm_elementwise(
                _distance_text(LEVELS[number], BASE_BITS), "=r,r", [x], dtype=tl.uint32, is_pure=True, pack=1
            )
        else:
            distance = _half_distance(x & 0xFFFF, LEVELS[number]) | (_half_distance(x >> 16, LEVELS[number]) << 16)
        found = found + (distance,)
    return found


@triton.jit
def _lesser(costs, come, distance, ASM: tl.constexpr):
    """The lesser of two costs and those of a step of this distance from ``come``, half by half."""
    if ASM:
        return tl.inline_asm_elementwise(
            "{.reg .b32 t; add.u16x2 t, $1, $2; min.u16x2 $0, t, $3;}", "=r,r,r,r", [come, distance, costs],
            dtype=tl.uint32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        other = come + distance
        return tl.minimum(costs & 0xFFFF, other & 0xFFFF) | (tl.minimum(costs >> 16, other >> 16) << 16)


@triton.constexpr_function
def _parted_text(group):
    """PTX: written as an addition, which takes one instruction where masks of two constants would take two."""
    lines = [".reg .b32 t;", "and.b32 $0, $2, 0x30003;", "sub.u32 t, $2, $0;", f"add.u32 $1, t, {group % 4 * 0x10001};"]
    return "{" + " ".join(lines) + "}"


@triton.jit
def _parted(costs, group: tl.constexpr, ASM: tl.constexpr):
    """The lowest bits of two costs, and the costs with those of their group instead."""
    if ASM:
        return tl.inline_asm_elementwise(
            _parted_text(group), "=&r,=r,r", [costs], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1
        )
    else:
        return costs & 3 * BOTH, (costs & 0xFFFC * BOTH) | group % 4 * BOTH


@triton.jit
def _step(costs, x, kept, LEVELS: tl.constexpr, NUMBERS: tl.constexpr, G: tl.constexpr, ASM: tl.constexpr):
    """Least costs of all groups after a step over x, a pair in uint32 [N] each; what they drop goes to ``kept``.

    The bits of eight groups fill a word, in both halves from the highest on.
    """
    distances = _distances(x, LEVELS, ASM)
    found = ()
    word = tl.zeros((_N,), tl.uint32)
    for place in tl.static_range(G):
        least = costs[_group(place, 4, G) * 4 % G] + distances[NUMBERS[_group(place, 4, G) * 4]]
        for bits in tl.static_range(1, 4):
            come = costs[(_group(place, 4, G) * 4 + bits) % G]
            least = _lesser(least, come, distances[NUMBERS[_group(place, 4, G) * 4 + bits]], ASM)
        dropped, cost = _parted(least, _group(place, 4, G), ASM)
        if place % 8 == 0:
            word = dropped
        else:
            word = word * 4 + dropped
        if place % 8 == 7 or place == G - 1:
            full = word << 2 * (7 - place % 8)
            tl.store(kept + place // 8 * _N + tl.arange(0, _N), full.to(tl.int32, bitcast=True))
        found = found + (cost,)
    by_group = ()
    for j in tl.static_range(G):
        by_group = by_group + (found[_place(j, 4, G)],)
    return by_group


@triton.jit
def _renewed(costs, G: tl.constexpr, ASM: tl.constexpr):
    """Costs less the least of all groups, but for their lowest bits."""
    nothing = tl.zeros((_N,), tl.uint32)
    least = costs[0]
    for j in tl.static_range(1, G):
        least = _lesser(least, costs[j], nothing, ASM)
    least = least & 0xFFFC * BOTH
    less = ()
    for j in tl.static_range(G):
        less = less + (costs[j] - least,)
    return less


@triton.jit
def _half_start(group, number: tl.constexpr):
    return tl.where((group == number) | (group < 0), 0, UNREACHABLE).to(tl.uint32)


@triton.jit
def _start(group_a, group_b, G: tl.constexpr, ASM: tl.constexpr):
    """Costs before a pass: none in these groups, or in any if they are negative.

    From assembly: of other numbers the compiler studies the divisors, for minutes.
    """
    costs = ()
    for j in tl.static_range(G):
        _, cost = _parted(_half_start(group_a, j) | (_half_start(group_b, j) << 16), j, ASM)
        costs = costs + (cost,)
    return costs


@triton.jit
def _words(kept, G: tl.constexpr):
    """All that ``_step`` left there: no load waits for the bits of another."""
    words = ()
    for k in tl.static_range((G + 7) // 8):
        words = words + (tl.load(kept + k * _N + tl.arange(0, _N)).to(tl.uint32, bitcast=True),)
    return words


@triton.jit
def _before(words, group, high: tl.constexpr, G: tl.constexpr):
    """The states that lead to these groups, from what was kept: of the first vectors or, ``high``, of the second."""
    place = group % (G // 4) * 4 + group // (G // 4)
    # By halves of the words that are left: fewer choices than there are words.
    for level in tl.static_range(5):
        half = ()
        for k in tl.static_range((len(words) + 1) // 2):
            if 2 * k + 1 < len(words):
                half = half + (tl.where((place >> 3 + level) & 1 != 0, words[2 * k + 1], words[2 * k]),)
            else:
                half = half + (words[2 * k],)
        words = half
    shift = (7 - place % 8) * 2 + 16 * high
    return (group << 2) | ((words[0] >> shift.to(tl.uint32)) & 3).to(tl.int32)


@triton.jit
def _boundary(costs, kept, ROW: tl.constexpr, G: tl.constexpr):
    """Both states after half of the 2 * HALF_SPAN steps, on the paths that end in the least of ``costs``."""
    firsts, seconds = (), ()
    for j in tl.static_range(G):
        firsts = firsts + ((costs[j] & 0xFFFF).to(tl.int32),)
        seconds = seconds + ((costs[j] >> 16).to(tl.int32),)
    a, b = _first_least(firsts, 2, G), _first_least(seconds, 2, G)
    for back in range(HALF_SPAN + 1):
        words = _words(kept + (2 * HALF_SPAN - 1 - back) * ROW, G)
        a, b = _before(words, a % G, False, G), _before(words, b % G, True, G)
    return a, b


@triton.jit
def _write(codes, table, squares, kept, last_a, last_b, row, n, STEPS, ROW: tl.constexpr, G: tl.constexpr):
    """The codes of the paths that end in these states, of vectors ``row`` and the next, and their sums of squares."""
    a, b = last_a, last_b
    sum_a, sum_b = tl.zeros((_N,), tl.float32), tl.zeros((_N,), tl.float32)
    for back in range(STEPS // 16):
        at = STEPS // 16 - 1 - back
        code_a, code_b = tl.zeros((_N,), tl.int32), tl.zeros((_N,), tl.int32)
        for part in range(4):
            # Four at once: their loads overlap.
            for i in tl.static_range(4):
                step = at * 16 + 15 - 4 * part - i
                words = _words(kept + step * ROW, G)
                a, b = _before(words, a % G, False, G), _before(words, b % G, True, G)
                a, b = tl.where(step == STEPS - 1, last_a, a), tl.where(step == STEPS - 1, last_b, b)
                value_a, value_b = tl.load(table + a), tl.load(table + b)
                sum_a += value_a * value_a
                sum_b += value_b * value_b
                code_a, code_b = (code_a << 2) | (a & 3), (code_b << 2) | (b & 3)
        tl.store(codes + row * (STEPS // 16) + at, code_a, mask=row < n)
        tl.store(codes + (row + 1) * (STEPS // 16) + at, code_b, mask=row + 1 < n)
    tl.store(squares + row, sum_a, mask=row < n)
    tl.store(squares + row + 1, sum_b, mask=row + 1 < n)


@triton.jit
def _search(
    x, table, scratch, codes, squares, first, n, stride, STEPS, LEVELS: tl.constexpr, NUMBERS: tl.constexpr,
    G: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    ROW: tl.constexpr = (G + 7) // 8 * _N
    pair = first // 2 + tl.program_id(0) * _N + tl.arange(0, _N)
    kept = scratch + tl.program_id(0).to(tl.int64) * (tl.maximum(STEPS, 2 * HALF_SPAN) * ROW)
    a, b = tl.full((_N,), -1, tl.int32), tl.full((_N,), -1, tl.int32)
    # The steps around the boundary, from anywhere; then all, from the boundary.
    for phase in range(2):
        begin = tl.where(phase == 0, STEPS - HALF_SPAN, 0)
        costs = _start(a >> 2, b >> 2, G, ASM)
        now = tl.load(x + begin.to(tl.int64) * stride + pair)
        for block in range(tl.where(phase == 0, 2 * HALF_SPAN, STEPS) // RENEWED):
            for i in range(block * RENEWED, block * RENEWED + RENEWED):
                # Loaded a step ahead: so small a load is waited for.
                later = tl.load(x + ((begin + i + 1) % STEPS).to(tl.int64) * stride + pair)
                costs = _step(costs, now.to(tl.uint32, bitcast=True), kept + i * ROW, LEVELS, NUMBERS, G, ASM)
                now = later
            costs = _renewed(costs, G, ASM)
        if phase == 0:
            a, b = _boundary(costs, kept, ROW, G)
    _write(codes, table, squares, kept, a, b, 2 * pair.to(tl.int64), n, STEPS, ROW, G)


@triton.jit(do_not_specialize=["first", "n"])
def search(x, table, scratch, codes, squares, first, n, stride, STEPS, ASM: tl.constexpr):
    """tcq2 for vectors from number ``first`` on, below n: int32 ``x`` [STEPS, stride], a pair of float16 each.

    ``first`` is even, stride a multiple of 32, STEPS of 16. Leaves ``codes`` int32 [n, STEPS / 16], and in ``squares``
    float32 [n] the sum of the squares of their values, which ``table`` float32 [states] holds. ``scratch`` is int32,
    8 KB or less for each of these vectors with 256 steps.
    """
    _search(x, table, scratch, codes, squares, first, n, stride, STEPS, LEVELS, NUMBERS, GROUPS, ASM)
