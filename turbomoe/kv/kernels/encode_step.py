"""Triton: a step of the trellis search over all its states, by assembly (``encode_assembly.py``) or its plain twin.

Costs are a tuple of uint32 [N], one for each group of states, with two vectors' in each word.
"""

# Triton's language has no types, and no unpacking in tuples.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,no-any-return"
# ruff: noqa: RUF005
from __future__ import annotations

import triton
import triton.language as tl

from turbomoe.kv.kernels import encode_assembly
from turbomoe.kv.trellis_codebook import TRELLISES

_N = tl.constexpr(encode_assembly.THREADS)
BOTH = tl.constexpr(0x00010001)  # times a number: the number in both halves
PLANS = {name: encode_assembly.plan(trellis) for name, trellis in TRELLISES.items()}


@triton.constexpr_function
def of(name, field):
    return getattr(PLANS[name], field)


@triton.constexpr_function
def entry(name, field, index):
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
def assembled(arguments, NAME: tl.constexpr, BLOCK: tl.constexpr, RESULTS: tl.constexpr, PURE: tl.constexpr):
    """A block of the plan, and so many results."""
    return tl.inline_asm_elementwise(
        entry(NAME, BLOCK, 0), entry(NAME, BLOCK, 1), arguments, dtype=_so_many(RESULTS), is_pure=PURE, pack=1
    )


@triton.jit
def _half_distances(x, NAME: tl.constexpr, value: tl.constexpr):
    """The twin of the PTX for one half: uint32 for every level of this value of a step, from the bits of x."""
    BASE: tl.constexpr = of(NAME, "base")
    base = tl.full((_N,), BASE, tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    found = ()
    for number in tl.static_range(_level_count(NAME, value)):
        e = x.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) - _level(NAME, value, number)
        e = e.to(tl.float16).to(tl.float32)
        pattern = tl.minimum(e * e + base, 1.0).to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
        found = found + ((pattern - BASE) << of(NAME, "step_bits"),)
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
    KB: tl.constexpr = of(NAME, "step_bits")
    G: tl.constexpr = of(NAME, "groups")
    EACH: tl.constexpr = of(NAME, "each")
    first = _distances(x, NAME, 0)
    second = _distances(y, NAME, of(NAME, "values") - 1)
    found = ()
    word = tl.zeros((_N,), tl.uint32)
    for place in tl.static_range(G):
        least = tl.full((_N,), 0xFFFFFFFF, tl.uint32)
        for bits in tl.static_range(1 << KB):
            cost = costs[_state(NAME, place, bits) % G] + first[_number(NAME, 0, _state(NAME, place, bits))]
            if of(NAME, "values") == 2:
                cost += second[_number(NAME, 1, _state(NAME, place, bits))]
            least = _lesser(least, cost)
        dropped = least & ((1 << KB) - 1) * BOTH
        if place % EACH == 0:
            word = dropped
        else:
            word = word | (dropped << place % EACH * KB)
        if place % EACH == EACH - 1 or place == G - 1:
            tl.store(kept + place // EACH * _N + tl.arange(0, _N), word.to(tl.int32, bitcast=True))
        found = found + ((least - dropped) | entry(NAME, "group_of", place) % (1 << KB) * BOTH,)
    by_group = ()
    for j in tl.static_range(G):
        by_group = by_group + (found[entry(NAME, "place_of", j)],)
    return by_group


@triton.jit
def step_over(costs, x, y, kept, NAME: tl.constexpr, ASM: tl.constexpr):
    """Least costs of all groups after a step over x (and y), two halves in uint32 [N] each; what they drop goes to
    ``kept``.

    State s comes from group s % G and goes to group s >> step_bits. The lowest bits of a cost are those of its group,
    so that they say in a minimum where it came from.
    """
    if not ASM:
        return _plain_step(costs, x, y, kept, NAME)
    elif of(NAME, "values") == 2:
        return assembled(costs + (x, y, kept + tl.arange(0, _N)), NAME, "step", of(NAME, "groups"), False)
    else:
        return assembled(costs + (x, kept + tl.arange(0, _N)), NAME, "step", of(NAME, "groups"), False)


@triton.jit
def renewed(costs, NAME: tl.constexpr, ASM: tl.constexpr):
    """Costs less the least of all groups, but for their lowest bits."""
    if ASM:
        return assembled(costs, NAME, "renewal", of(NAME, "groups"), True)
    else:
        least = costs[0]
        for j in tl.static_range(1, of(NAME, "groups")):
            least = _lesser(least, costs[j])
        least = least & (0x10000 - (1 << of(NAME, "step_bits"))) * BOTH
        less = ()
        for j in tl.static_range(of(NAME, "groups")):
            less = less + (costs[j] - least,)
        return less


@triton.jit
def limited(costs, NAME: tl.constexpr, ASM: tl.constexpr):
    """Costs, at most those of groups without a path, but for their lowest bits."""
    if ASM:
        return assembled(costs, NAME, "limit", of(NAME, "groups"), True)
    else:
        less = ()
        for j in tl.static_range(of(NAME, "groups")):
            most = tl.full((_N,), of(NAME, "unreachable") | j % (1 << of(NAME, "step_bits")), tl.uint32)
            less = less + (_lesser(costs[j], most * BOTH),)
        return less


@triton.jit
def _named(cost, own: tl.constexpr, ASM: tl.constexpr):
    """Costs with these lowest bits. From assembly: of other numbers the compiler studies the divisors, for minutes."""
    if ASM:
        return tl.inline_asm_elementwise(
            "or.b32 $0, $1, $2;", "=r,r,r", [cost, own * BOTH], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        return cost | own * BOTH


@triton.jit
def start(group_a, group_b, NAME: tl.constexpr, ASM: tl.constexpr):
    """Costs before a pass: none in these groups, or in any if they are negative."""
    costs = ()
    for j in tl.static_range(of(NAME, "groups")):
        a = tl.where((group_a == j) | (group_a < 0), 0, of(NAME, "unreachable")).to(tl.uint32)
        b = tl.where((group_b == j) | (group_b < 0), 0, of(NAME, "unreachable")).to(tl.uint32)
        costs = costs + (_named(a | (b << 16), j % (1 << of(NAME, "step_bits")), ASM),)
    return costs
