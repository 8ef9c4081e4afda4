"""The trellises and their codebooks: what a window of the bit stream stands for.

A bit-shift trellis: step i of a vector reads ``window_bits`` bits of a circular stream from bit ``step_bits * i`` on,
so neighbouring steps share bits and a value costs fewer bits than choose it. (Codebooks computed from a window, not
stored, are those of arXiv 2406.11235; this computation is our own.)

It is made for GPUs that permute bytes: bitwise functions of shifted copies of the stream leave three bits in each
nibble, for eight values at once; each triple chooses one of eight bytes in a table, and the bytes of two or three
tables are added. Shifts, functions and tables were searched together for the error of whole paths on Gaussian vectors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache

import torch

UNIT = 2.0**-5  # of the tables


@dataclass(frozen=True)
class Lookup:
    """A table of eight levels, in ``UNIT``, and what chooses among them.

    ``taps`` are right shifts of the stream (negative: left), a, b, c and d. ``function`` is the truth table of
    f(a, b, c), bit 4 a + 2 b + c, and ``last`` that of g(f, d), bit 2 f + d. ``mask`` says to which of the three bits d
    belongs; at the others it is 0.
    """

    taps: tuple[int, int, int, int]
    function: int
    last: int
    levels: tuple[int, ...]
    mask: int = 7

    def bit(self, seen: Mapping[int, int]) -> int:
        """What is chosen where each tap shows this bit."""
        a, b, c, d = (seen.get(tap, 0) for tap in self.taps)
        return self.last >> 2 * (self.function >> 4 * a + 2 * b + c & 1) + d & 1

    @property
    def needed(self) -> list[int]:
        """The taps that make a difference, in order."""
        taps = list(dict.fromkeys(self.taps))
        every = [dict(zip(taps, bits, strict=True)) for bits in itertools.product((0, 1), repeat=len(taps))]
        return [tap for tap in taps if any(self.bit(seen) != self.bit(seen | {tap: 1 - seen[tap]}) for seen in every)]


@dataclass(frozen=True)
class Trellis:
    """``step_bits`` new bits a step, ``values`` values a step, each the sum of what ``lookups`` find in its nibble.

    Lookups see the bits of a step ``field`` bits apart from the next one's, with zeros between: in whole nibbles.
    """

    name: str
    window_bits: int
    step_bits: int
    values: int
    field: int
    lookups: tuple[Lookup, ...]

    @property
    def states(self) -> int:
        return 1 << self.window_bits

    @property
    def group_words(self) -> int:
        """The fewest 32-bit words that hold whole steps."""
        return math.lcm(32, self.step_bits) // 32

    @property
    def groups(self) -> int:
        """Windows that differ in nothing but the bits that the next step drops, or adds, are one group."""
        return 1 << self.window_bits - self.step_bits


TRELLISES = {
    trellis.name: trellis
    for trellis in (
        Trellis("tcq2", 9, 2, 1, 2, (
            Lookup((6, 6, 6, -1), 0xF0, 0x6, (30, 19, -14, -36, 10, -3, 64, 43), mask=6),
            Lookup((4, 1, 1, 1), 0x3C, 0xC, (-22, -23, -7, -5, 16, -42, -14, -13)),
        )),
        Trellis("tcq2.5", 10, 5, 2, 8, (
            Lookup((1, 8, 5, -2), 0x96, 0x6, (17, -5, 7, 62, 43, -41, -19, 30)),
            Lookup((-3, 2, 2, 4), 0x77, 0x6, (20, -3, -25, -10, -21, -3, -48, -12)),
        )),
        Trellis("tcq3", 10, 3, 1, 4, (
            Lookup((0, 10, 9, 10), 0x5A, 0x6, (-5, 30, -50, -29, 18, -15, 6, 53)),
            Lookup((9, 6, 0, 3), 0xBF, 0x6, (-74, 14, 60, -14, -29, -4, -1, 4)),
        )),
        Trellis("tcq4", 10, 4, 1, 4, (
            Lookup((0, 4, 4, 7), 0x3C, 0x6, (-13, 7, -6, -45, 44, -26, 14, 26), mask=4),
            Lookup((3, 3, 3, 3), 0xF0, 0xC, (-2, -12, -8, 36, 13, 2, -36, 10)),
            Lookup((5, 7, 7, 7), 0x3C, 0xC, (10, 32, 4, -19, -32, -10, 18, -4)),
        )),
    )
}  # fmt: skip

# Mean squared error relative to the energy, of Gaussian vectors with their norm restored, by head size. Measured on 3
# million values with the search of ``trellis_search``; the standard error is about 0.1%.
GAUSSIAN_NMSE = {
    "tcq2": {64: 0.0751, 128: 0.0754, 256: 0.0756},
    "tcq2.5": {64: 0.0375, 128: 0.0383, 256: 0.0386},
    "tcq3": {64: 0.0186, 128: 0.0189, 256: 0.0190},
    "tcq4": {64: 0.00495, 128: 0.00511, 256: 0.00519},
}


@lru_cache(maxsize=32)
def codebook(trellis: Trellis, device: str = "cpu") -> torch.Tensor:
    """The values of every window: float32 [values, states], each exact in half precision. Do not write to it."""
    stream = _spread(torch.arange(trellis.states), trellis)
    total = torch.zeros(trellis.values, trellis.states, dtype=torch.int64)
    for lookup in trellis.lookups:
        chosen = _chosen(stream, lookup)
        nibbles = torch.stack([chosen >> 4 * value & 7 for value in range(trellis.values)])
        total += torch.tensor(lookup.levels)[nibbles]
    return (total * UNIT).float().to(device)


@cache  # descriptions for the C core hold its address
def by_window(trellis: Trellis) -> torch.Tensor:
    """The codebook window by window: float32 [states, values]."""
    return codebook(trellis).t().contiguous()


@lru_cache(maxsize=32)
def by_dropped_bits(trellis: Trellis) -> torch.Tensor:
    """The codebook in the order of the compiled search: float32 [values, dropped bits, groups]."""
    return codebook(trellis).view(trellis.values, trellis.groups, -1).transpose(1, 2).contiguous()


def _spread(windows: torch.Tensor, trellis: Trellis) -> torch.Tensor:
    """Bit b of step s of a window at place field * s + b."""
    mask, found = (1 << trellis.step_bits) - 1, torch.zeros_like(windows)
    for step in range(-(-trellis.window_bits // trellis.step_bits)):
        found |= (windows >> step * trellis.step_bits & mask) << step * trellis.field
    return found


def _chosen(stream: torch.Tensor, lookup: Lookup) -> torch.Tensor:
    """The bits that choose, at the place of each bit of the stream."""
    a, b, c, d = (stream >> tap if tap >= 0 else stream << -tap for tap in lookup.taps)
    first, found = torch.zeros_like(stream), torch.zeros_like(stream)
    for n in range(8):
        if lookup.function >> n & 1:
            first |= (a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c)
    d = d & lookup.mask * 0x1111
    for n in range(4):
        if lookup.last >> n & 1:
            found |= (first if n & 2 else ~first) & (d if n & 1 else ~d)
    return found
