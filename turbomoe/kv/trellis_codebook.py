"""The trellises and their codebooks: what a window of the bit stream stands for.

A bit-shift trellis: step i of a vector reads ``window_bits`` bits of a circular stream from bit ``step_bits * i`` on,
so neighbouring steps share bits and a value costs fewer bits than choose it. The window w is hashed by ``w *
multiplier``, modulo 2^window_bits, into u in [-1, 1], and an odd polynomial in u gives a value spread like N(0, 1)
(codebooks of arXiv 2406.11235 are made so). The arithmetic is that of halves, operation by operation: a GPU then makes
the values with packed half FMAs, bit for bit those of the tables here. Multipliers were searched and coefficients
fitted on Gaussian vectors for the error of whole paths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import numpy.typing as npt
import torch

Halves = npt.NDArray[np.float16]


@dataclass(frozen=True)
class Trellis:
    """``step_bits`` new bits a step, ``len(multipliers)`` values a step; coefficients of u^exponent for each value."""

    name: str
    window_bits: int
    step_bits: int
    multipliers: tuple[int, ...]
    exponents: tuple[int, ...]
    coefficients: tuple[tuple[float, ...], ...]

    @property
    def values(self) -> int:
        """Values a step."""
        return len(self.multipliers)

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
        Trellis("tcq2", 9, 2, (123,), (1, 5), ((1.271484375, 1.1220703125),)),
        Trellis("tcq2.5", 10, 5, (371, 427), (1, 5, 33), (
            (1.3173828125, 0.74609375, 0.9853515625), (1.328125, 0.734375, 0.99658203125),
        )),
        Trellis("tcq3", 10, 3, (123,), (1, 5, 33), ((1.298828125, 0.67529296875, 1.146484375),)),
        Trellis("tcq4", 10, 4, (61,), (1, 5, 33), ((1.28125, 0.62744140625, 1.2822265625),)),
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
    rows = [
        _polynomial(_hash(trellis.window_bits, multiplier), trellis.exponents, coefficients)
        for multiplier, coefficients in zip(trellis.multipliers, trellis.coefficients, strict=True)
    ]
    return torch.from_numpy(np.stack(rows).astype(np.float32)).to(device)


@cache  # descriptions for the C core hold its address
def by_window(trellis: Trellis) -> torch.Tensor:
    """The codebook window by window: float32 [states, values]."""
    return codebook(trellis).t().contiguous()


@lru_cache(maxsize=32)
def by_dropped_bits(trellis: Trellis) -> torch.Tensor:
    """The codebook in the order of the compiled search: float32 [values, dropped bits, groups]."""
    return codebook(trellis).view(trellis.values, trellis.groups, -1).transpose(1, 2).contiguous()


def _hash(window_bits: int, multiplier: int) -> Halves:
    """u of every window: half [states], in [-1, 1), exact."""
    half = 1 << window_bits - 1
    product = np.arange(2 * half) * multiplier
    return (product % (2 * half) / half - 1).astype(np.float16)


def _polynomial(u: Halves, exponents: tuple[int, ...], coefficients: tuple[float, ...]) -> Halves:
    """c1 u + c2 u^e2 + ..., from the last term to the second, then times u. Powers come by squaring."""
    powers, exponent = {1: u}, 1
    while exponent < exponents[-1] - 1:
        powers[2 * exponent] = powers[exponent] * powers[exponent]
        exponent *= 2
    total = np.full_like(u, coefficients[0])
    for exponent, coefficient in list(zip(exponents, coefficients, strict=True))[:0:-1]:
        total = _fma(powers[exponent - 1], np.full_like(u, coefficient), total)
    return total * u


def _fma(a: Halves, b: Halves, c: Halves) -> Halves:
    """a * b + c, rounded once: float64 holds the exact sum of such numbers."""
    wide = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
    return wide.astype(np.float16)
