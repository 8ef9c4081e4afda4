"""The trellises and their codebooks: what a window of the bit stream stands for.

A bit-shift trellis: step i of a vector reads ``window_bits`` bits of a circular stream from bit ``step_bits * i`` on,
so neighbouring steps share bits and a value costs fewer bits than choose it. (Codebooks computed from a window, not
stored, are those of arXiv 2406.11235; this computation is our own.)

It is made for GPUs that permute bytes: bitwise functions of shifted copies of the stream leave three bits in each
nibble, for eight values at once; each triple chooses one of eight bytes in a table, and the bytes of two or three
tables are added. Or (``Magnitudes``) the bits of 32 steps lie in planes, so that a bitwise function of any bits of a
window serves 32 steps at once. Shifts, functions and tables were searched together for the error of whole paths on
Gaussian vectors.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from functools import cache, lru_cache

import torch

UNIT = 2.0**-5  # of the tables
ALL = 0x77  # three bits of both nibbles of a byte


@dataclass(frozen=True)
class Lookup:
    """A table of eight levels, in ``UNIT``, and what chooses among them.

    Each tap is a right shift of the stream (negative: left) and the bits of a byte that it counts for, repeated in
    every byte. Taps are joined by exclusive or; or the first three by ``function``, a truth table whose bit
    4 a + 2 b + c is f(a, b, c).
    """

    taps: tuple[tuple[int, int], ...]
    levels: tuple[int, ...]
    function: int | None = None


@dataclass(frozen=True)
class Magnitudes:
    """Sixteen levels: a sign and eight magnitudes, the outer ones for fewer windows than the inner ones.

    Magnitudes are odd, in half of ``UNIT``: signed bytes b stand for 2 b + 1, and a complement changes the sign.
    ``masks`` has six for each value of a step: the bits of a window whose exclusive or is the sign (1: negative), then
    a, b, and c, d, e. Magnitude 2 a + b is chosen, or 4 + 2 d + e where a, b and c are all 1: the fourth for one window
    in eight, the last four for one in 32 each.
    """

    masks: tuple[tuple[int, int, int, int, int, int], ...]
    levels: tuple[int, ...]


@dataclass(frozen=True)
class Trellis:
    """``step_bits`` new bits a step, ``values`` values a step: one by ``lookups``, the sum of what they find in its
    nibble, or any number by ``magnitudes``.

    Lookups see the bits of a step ``field`` bits apart from the next one's, with zeros between: in whole nibbles.
    """

    name: str
    window_bits: int
    step_bits: int
    values: int
    field: int
    lookups: tuple[Lookup, ...]
    magnitudes: Magnitudes | None = None

    def __post_init__(self) -> None:
        """What the assembly takes for granted."""
        for lookup in self.lookups:
            assert lookup.function is None or all(mask == ALL for _, mask in lookup.taps[:3])
        if self.magnitudes is None:
            assert self.values == 1
        else:
            assert not self.lookups and len(self.magnitudes.masks) == self.values

    @property
    def states(self) -> int:
        return 1 << self.window_bits

    @property
    def group_words(self) -> int:
        """The fewest 32-bit words that hold whole steps."""
        return math.lcm(32, self.step_bits) // 32

    @property
    def turns(self) -> int:
        """Batches of eight values that take turns in the same 32 bits: those of fields narrower than a nibble."""
        return max(1, 4 // self.field)

    @property
    def groups(self) -> int:
        """Windows that differ in nothing but the bits that the next step drops, or adds, are one group."""
        return 1 << self.window_bits - self.step_bits


TRELLISES = {
    trellis.name: trellis
    for trellis in (
        Trellis("tcq2", 9, 2, 1, 2, (
            Lookup(((6, ALL), (-1, 0x66)), (30, 19, -14, -36, 10, -3, 64, 43)),
            Lookup(((4, ALL), (1, ALL)), (-22, -23, -7, -5, 16, -42, -14, -13)),
        )),
        Trellis("tcq2.5", 10, 5, 2, 0, (), Magnitudes((
            (522, 82, 265, 1, 128, 512), (289, 140, 560, 4, 128, 2),
        ), (11, 35, 65, 101, 95, 131, 137, 177))),
        Trellis("tcq3", 10, 3, 1, 4, (
            Lookup(((0, ALL), (9, ALL), (10, ALL)), (-5, 30, -50, -29, 18, -15, 6, 53)),
            Lookup(((9, ALL), (6, ALL), (0, ALL), (3, ALL)), (-74, 14, 60, -14, -29, -4, -1, 4), function=0xBF),
        )),
        Trellis("tcq4", 10, 4, 1, 4, (
            Lookup(((0, ALL), (4, ALL), (7, 0x44)), (-13, 7, -6, -45, 44, -26, 14, 26)),
            Lookup(((3, ALL),), (-2, -12, -8, 36, 13, 2, -36, 10)),
            Lookup(((5, ALL), (7, ALL)), (10, 32, 4, -19, -32, -10, 18, -4)),
        )),
    )
}  # fmt: skip

# Mean squared error relative to the energy, of Gaussian vectors with their norm restored, by head size. Measured on 3
# million values with the search of ``trellis_search``; the standard error is about 0.1%.
GAUSSIAN_NMSE = {
    "tcq2": {64: 0.0750, 128: 0.0753, 256: 0.0755},
    "tcq2.5": {64: 0.0376, 128: 0.0382, 256: 0.0386},
    "tcq3": {64: 0.0192, 128: 0.0193, 256: 0.0194},
    "tcq4": {64: 0.00511, 128: 0.00519, 256: 0.00524},
}


@lru_cache(maxsize=32)
def codebook(trellis: Trellis, device: str = "cpu") -> torch.Tensor:
    """The values of every window: float32 [values, states], each exact in half precision. Do not write to it."""
    windows = torch.arange(trellis.states)
    if trellis.magnitudes is not None:
        total = _signed(windows, trellis.magnitudes) / 2
    else:
        stream = _spread(windows, trellis)
        total = torch.stack([_found(stream, lookup) for lookup in trellis.lookups]).sum(0)[None]
    return (total * UNIT).float().to(device)


def _signed(windows: torch.Tensor, magnitudes: Magnitudes) -> torch.Tensor:
    """In half of ``UNIT``, int64 [values, windows]."""
    shape = (len(magnitudes.masks), 6, len(windows))
    sign, a, b, c, d, e = torch.stack([_parity(windows & m) for m in sum(magnitudes.masks, ())]).view(shape).unbind(1)
    chosen = torch.where(a & b & c == 1, 4 + 2 * d + e, 2 * a + b)
    return torch.tensor(magnitudes.levels)[chosen] * (1 - 2 * sign)


def _parity(x: torch.Tensor) -> torch.Tensor:
    """The exclusive or of the 16 lowest bits."""
    for half in (8, 4, 2, 1):
        x = x ^ x >> half
    return x & 1


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


def _found(stream: torch.Tensor, lookup: Lookup) -> torch.Tensor:
    """The level of each window, int64 [windows]."""
    seen = [(stream >> shift if shift >= 0 else stream << -shift) & mask for shift, mask in lookup.taps]
    if lookup.function is not None:
        a, b, c, *seen = seen
        terms = [_minterm(n, a, b, c) for n in range(8) if lookup.function >> n & 1]
        seen.append(functools.reduce(torch.bitwise_or, terms))
    return torch.tensor(lookup.levels)[functools.reduce(torch.bitwise_xor, seen) & 7]


def _minterm(n: int, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """The bits at which a, b, c make the number n."""
    return (a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c) & ALL
