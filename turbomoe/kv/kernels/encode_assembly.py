"""PTX for the trellis search: a step over all states of a trellis, in one block, two vectors a register.

A state and step is one addition and minimum, which the assembler joins (sm_90); a group, three instructions more that
change the lowest bits of its cost for its own, and note what they were. States come in one of two orders. Where the
registers hold all distances beside the costs, groups that share predecessors follow each other, so that new costs take
the place of old ones. Else states of equal distance do, so that none is made twice or kept.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache

from turbomoe.kv.kernels.assembly import Block, Writer, half2
from turbomoe.kv.trellis_codebook import Trellis
from turbomoe.kv.trellis_fixed import fixed

ROOM = 200  # registers of a thread's 255 for costs and distances
THREADS = 32  # of a program


@dataclass(frozen=True)
class Kept:
    """Where the bits that the groups drop in a step lie: in words of two halves, one a vector, ``each`` groups a word.

    Groups that share predecessors lie side by side.
    """

    step_bits: int
    groups: int

    @property
    def each(self) -> int:
        return 16 // self.step_bits

    @property
    def words(self) -> int:
        return -(-self.groups // self.each)

    def place(self, group: int) -> int:
        apart = self.groups >> self.step_bits
        return (group % apart << self.step_bits) + group // apart


def kept(trellis: Trellis) -> Kept:
    return Kept(trellis.step_bits, trellis.groups)


def twice(number: int) -> str:
    """As an operand: the number in both halves, which do not carry into each other if they do not overflow."""
    return f"0x{number * 0x10001 % (1 << 32):08x}"


@lru_cache(maxsize=32)
def step(trellis: Trellis) -> Block:
    """In: a cost of every group with the group's lowest bits, and a register of halves for each value of the step; then
    the address where the thread keeps its words, a row of all threads each. Out: costs likewise.
    """
    return _Step(trellis).block()


class _Step:
    def __init__(self, trellis: Trellis) -> None:
        self.trellis, self.parts, self.kept = trellis, fixed(trellis), kept(trellis)
        self.many = 1 << trellis.step_bits
        self.w = Writer(trellis.groups + trellis.values, trellis.groups)
        self.base = self.w.constant(twice(self.parts.base))
        self.made: dict[tuple[int, ...], str] = {}
        self.least: dict[int, str] = {}
        self.words: dict[int, list[str]] = {}

    def block(self) -> Block:
        met = [0] * self.trellis.groups
        for state in _order(self.trellis):
            group = state // self.many
            self._reach(state, group)
            met[group] += 1
            if met[group] == self.many:
                self._part(group)
        return self.w.block()

    def _reach(self, state: int, group: int) -> None:
        come, distance = self.w.word(state % self.trellis.groups), self._distance(state)
        if group not in self.least:
            self.least[group] = self.w.op("add.u32", come, distance)
            return
        total = self.w.op("add.u16x2", come, distance)
        self.least[group] = self.w.op("min.u16x2", total, self.least[group])

    def _distance(self, state: int) -> str:
        found = tuple(numbers[state] for numbers in self.parts.numbers)
        if found not in self.made:
            first, *others = (self._value_distance(value, number) for value, number in enumerate(found))
            for other in others:
                first = self.w.op("add.u32", first, other)
            self.made[found] = first
        return self.made[found]

    def _value_distance(self, value: int, number: int) -> str:
        """The distances of two x to one of the values, shifted."""
        key = (-1 - value, number)
        if key not in self.made:
            x = self.w.word(self.trellis.groups + value)
            minus = self.w.constant(half2(-self.parts.levels[value][number]))
            e = self.w.op("add.rn.f16x2", x, minus)
            pattern = self.w.op("fma.rn.sat.f16x2", e, e, self.base)
            less = self.w.constant(twice(-self.parts.base * self.many))
            self.made[key] = self.w.op("mad.lo.u32", pattern, str(self.many), less)
        return self.made[key]

    def _part(self, group: int) -> None:
        """What was dropped is what the cost lost, but for the bits that it got: so multiply-adds note it, for which
        there is more room than for bitwise instructions.
        """
        least, own, rest = self.least[group], twice(group % self.many), twice(0xFFFF & -self.many)
        self.w.op("lop3.b32", least, self.w.constant(rest), own, "0xea", to=f"${group}")  # (least & rest) | own
        place = self.kept.place(group)
        number, factor = place // self.kept.each, 1 << place % self.kept.each * self.trellis.step_bits
        noted = self.words.setdefault(number, [self._own_bits(number)])
        before = self.w.op("mad.lo.u32", least, str(factor), noted[-1])
        noted.append(self.w.op("mad.lo.u32", f"${group}", str(-factor), before))
        if len(noted) > min(self.kept.each, self.trellis.groups - number * self.kept.each):
            where = f"[{self.w.word(self.w.inputs)}+{4 * THREADS * number}]"
            self.w.op("st.global.b32", noted[-1], to=where)

    def _own_bits(self, number: int) -> str:
        """A word that holds each group's own bits in its place."""
        groups = [g for g in range(self.trellis.groups) if self.kept.place(g) // self.kept.each == number]
        shifts = [self.kept.place(g) % self.kept.each * self.trellis.step_bits for g in groups]
        return twice(sum(g % self.many << shift for g, shift in zip(groups, shifts, strict=True)))


def _order(trellis: Trellis) -> list[int]:
    """All states, in the order in which a step meets them."""
    numbers = list(zip(*fixed(trellis).numbers, strict=True))
    if trellis.groups + len(set(numbers)) > ROOM:
        return sorted(range(trellis.states), key=numbers.__getitem__)
    place = kept(trellis).place
    return sorted(range(trellis.states), key=lambda state: place(state >> trellis.step_bits))


@lru_cache(maxsize=32)
def renew(trellis: Trellis) -> Block:
    """Costs less the least of all groups, but for their lowest bits."""
    w = Writer(trellis.groups, trellis.groups)
    costs = [w.word(group) for group in range(trellis.groups)]
    least = costs
    while len(least) > 1:
        pairs = zip(least[::2], least[1::2], strict=True)
        least = [w.op("min.u16x2", *pair) for pair in pairs]
    alone = w.op("and.b32", least[0], twice(0xFFFF & -(1 << trellis.step_bits)))
    for group, cost in enumerate(costs):
        w.op("sub.s32", cost, alone, to=f"${group}")
    return w.block()


@lru_cache(maxsize=32)
def limit(trellis: Trellis) -> Block:
    """Costs, at most ``unreachable`` each, but for their lowest bits."""
    w, most = Writer(trellis.groups, trellis.groups), fixed(trellis).unreachable
    for group in range(trellis.groups):
        w.op("min.u16x2", w.word(group), w.constant(twice(most | group % (1 << trellis.step_bits))), to=f"${group}")
    return w.block()


@lru_cache(maxsize=32)
def load(words: int) -> Block:
    """What ``step`` kept at an address. In assembly for the compiler's sake: a load takes it half a second."""
    lines = "".join(f"ld.global.b32 ${k}, [${words}+{4 * THREADS * k}];\n" for k in range(words))
    return Block("{\n" + lines + "}", 0, words)


@dataclass(frozen=True)
class Plan:
    """What the kernel asks about a trellis; blocks are their text and their constraints."""

    step_bits: int
    groups: int
    values: int
    stream_words: int
    renewed: int
    limited: int
    unreachable: int
    base: int
    levels: tuple[tuple[float, ...], ...]
    numbers: tuple[tuple[int, ...], ...]
    each: int
    words: int
    place_of: tuple[int, ...]
    group_of: tuple[int, ...]
    step: tuple[str, str]
    renewal: tuple[str, str]
    limit: tuple[str, str]
    load: tuple[str, str]

    @cached_property
    def version(self) -> str:
        """By which kept compilations know that a codebook is another."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


def plan(trellis: Trellis) -> Plan:
    parts, noted = fixed(trellis), kept(trellis)
    places = tuple(noted.place(group) for group in range(trellis.groups))
    return Plan(
        step_bits=trellis.step_bits,
        groups=trellis.groups,
        values=trellis.values,
        stream_words=trellis.group_words,
        renewed=parts.renewed,
        limited=parts.limited,
        unreachable=parts.unreachable,
        base=parts.base,
        levels=parts.levels,
        numbers=parts.numbers,
        each=noted.each,
        words=noted.words,
        place_of=places,
        group_of=tuple(map(places.index, range(trellis.groups))),
        step=_with_address(step(trellis)),
        renewal=renew(trellis).parts,
        limit=limit(trellis).parts,
        load=_with_address(load(noted.words)),
    )


def _with_address(block: Block) -> tuple[str, str]:
    text, operands = block.parts
    return text, operands + ",l"
