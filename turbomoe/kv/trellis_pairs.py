"""Costs of paths in 16 bits, so that a GPU's register holds those of two vectors: what tcq2 can bear.

x is clipped to +-4 and rounded to 2^-7, so e = x - v is exact in half precision. A distance is how far e^2 + 16 in half
precision lies from 16, in bit patterns: e^2 in units of 1/64, from 16 on of 1/32 that count as one. Times four, so that
the lowest bits can name the state within its group: one minimum finds the least cost and who has it, the lowest state
on ties. The error of Gaussian vectors grows by up to 0.1% (3,000 vectors).

The range: a distance is at most 4 * 2047 = 8,188 where e^2 < 48, and four steps lead from every group to every group.
So costs differ by at most 4 * 8,188. Every eight steps the least is taken from all: then they are in [0, 4 * 8,188],
the next four steps add 8,188 each, and from the fourth on a path from the least group bounds all: 8 * 8,188 + 3 <
2^16. A group without a path starts with more than four steps cost and ends with at most four more: 32,768 does.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from turbomoe.kv.trellis_codebook import Trellis, codebook

LARGEST = 4.0  # of x
UNIT = 2.0**-7  # of x
UNREACHABLE = 1 << 15
RENEWED = 8  # steps
BASE = 16  # what squares are added to, in half precision
BASE_BITS = 0x4C00
MANY = 4  # states of a group


@lru_cache(maxsize=32)
def levels(trellis: Trellis) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The different values v of the trellis, as the bits of -v in half precision; for every window which is its own."""
    values, numbers = codebook(trellis)[0].unique(return_inverse=True)
    patterns = (-values).half().view(torch.int16).int() & 0xFFFF
    return tuple(patterns.tolist()), tuple(numbers.tolist())


def fits(trellis: Trellis) -> bool:
    """Whether costs of this trellis stay in range, and the distances of all levels in a thread's registers."""
    if (trellis.step_bits, trellis.values) != (2, 1) or trellis.window_bits > 10:
        return False
    return len(levels(trellis)[0]) <= 64 and (LARGEST + float(codebook(trellis).abs().max())) ** 2 < 48


def to_halves(spread: torch.Tensor) -> torch.Tensor:
    """Coordinates of unit variance as float16, clipped and rounded."""
    return (spread.clamp(-LARGEST, LARGEST) / UNIT).round().mul(UNIT).half()


def distances(x: torch.Tensor, trellis: Trellis) -> torch.Tensor:
    """From float16 [n] to the values of all windows: int32 [n, states], multiples of four."""
    e = x.float()[:, None] - codebook(trellis, str(x.device))
    patterns = (e * e + BASE).half().view(torch.int16).int()  # float32 holds the sum exactly
    return (patterns - BASE_BITS) * MANY


def forward(x: torch.Tensor, costs: torch.Tensor, trellis: Trellis) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Float16 [n, steps] and costs int32 [n, groups], modulo 2^16: costs after all steps, and those of each step with
    the state's bits in them.
    """
    own = torch.arange(trellis.groups, dtype=torch.int32, device=x.device) % MANY
    every = []
    for number, step in enumerate(x.unbind(1), start=1):
        total = (costs | own).repeat(1, MANY) + distances(step, trellis) & 0xFFFF
        every.append(total.unflatten(1, (trellis.groups, MANY)).amin(-1))
        costs = every[-1] & -MANY
        if number % RENEWED == 0:
            costs = costs - costs.amin(1, keepdim=True)
    return costs, every
