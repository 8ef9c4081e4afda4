"""The search of ``trellis_search`` in fixed point, as the GPU does it: two integer instructions a state and step.

A cost lacks the square of x, the same for all states: v^2 - 2 x v, in units of 2^-(x_digits + v_digits) and shifted by
``step_bits``, so that the lowest bits can name the state within its group: one integer minimum then finds the least
cost and who has it, the lowest state on ties. x is rounded to 2^-x_digits and v to 2^-v_digits, so some paths are not
those of floats: the error of Gaussian vectors grows by up to 0.03% (tcq4, 3,000 vectors).

The range, for the at most 256 coordinates of unit variance of a vector: costs fall by at most the sum of the squares of
x, 256, and rise above their start by at most 320 before every state has a path. Two paths to a state differ by at most
(16 + 4^0.5 * 3.9)^2 < 570 in the four steps, or fewer, that reach every state. So all costs are in (0, 2048).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from turbomoe.kv import trellis_pairs
from turbomoe.kv.trellis_codebook import Trellis, codebook
from turbomoe.kv.trellis_search import HALF_SPAN

LARGEST = 256  # coordinates
DIGITS = 20  # binary ones after the point, the state's bits included; eleven before it, and the sign
START = 640 << DIGITS
UNREACHABLE = 2 * START

Forward = Callable[[torch.Tensor, torch.Tensor, Trellis], tuple[torch.Tensor, list[torch.Tensor]]]


@dataclass(frozen=True)
class FixedTrellis:
    """For every window: a step costs ``slopes[v][w] * x[v]`` summed over its values, plus ``offsets[w]``."""

    slopes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    unit: float  # of x


@lru_cache(maxsize=32)
def fixed(trellis: Trellis) -> FixedTrellis:
    x_digits = (DIGITS - trellis.step_bits) // 2
    v_digits = DIGITS - trellis.step_bits - x_digits
    v = (codebook(trellis).double() * 2**v_digits).round().long()
    squares = (v * v).sum(0).double() * 2.0 ** (x_digits - v_digits)
    offsets = squares.round().long() << trellis.step_bits
    slopes = -2 * v << trellis.step_bits
    return FixedTrellis(tuple(map(tuple, slopes.tolist())), tuple(offsets.tolist()), 2.0**-x_digits)


def to_fixed(spread: torch.Tensor, trellis: Trellis) -> torch.Tensor:
    """Coordinates of unit variance as int16: the largest is 16."""
    return (spread * (1 / fixed(trellis).unit)).round().to(torch.int16)


def search_fixed(spread: torch.Tensor, trellis: Trellis) -> torch.Tensor:
    """Like ``trellis_search.search``, with the paths that the GPU finds: the reference of ``kernels/encode.py`` and,
    where 16 bits do (``trellis_pairs``), of ``kernels/encode_pairs.py``.
    """
    if trellis_pairs.fits(trellis):
        return _circle(trellis_pairs.to_halves(spread), trellis, trellis_pairs.forward, 0, trellis_pairs.UNREACHABLE)
    x = to_fixed(spread, trellis).int().unflatten(-1, (-1, trellis.values))
    return _circle(x, trellis, _forward, START, UNREACHABLE)


def _circle(x: torch.Tensor, trellis: Trellis, forward: Forward, begin: int, unreachable: int) -> torch.Tensor:
    """Steps [n, steps, ...] to windows int64 [n, steps]; ``begin`` is the cost of a path before its first step."""
    near = torch.arange(-HALF_SPAN, HALF_SPAN, device=x.device).remainder(x.shape[1])
    start = torch.full((len(x), trellis.groups), begin, dtype=torch.int32, device=x.device)
    costs, least = forward(x[:, near], start, trellis)
    state = _back(costs.min(-1).indices, least[HALF_SPAN - 1 :], trellis)[0]
    start = torch.full_like(start, unreachable).scatter_(1, state[:, None] >> trellis.step_bits, begin)
    _, least = forward(x, start, trellis)
    return torch.stack([*_back(state % trellis.groups, least[:-1], trellis), state], 1)


def _forward(x: torch.Tensor, costs: torch.Tensor, trellis: Trellis) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Least costs int32 [n, groups] after all steps, and those of each step with the state's bits in them."""
    parts = fixed(trellis)
    slopes = torch.tensor(parts.slopes, dtype=torch.int32, device=x.device)
    offsets = torch.tensor(parts.offsets, dtype=torch.int32, device=x.device)
    own = torch.arange(trellis.groups, dtype=torch.int32, device=x.device) % (1 << trellis.step_bits)
    every = []
    for step in x.unbind(1):
        total = (costs | own).repeat(1, 1 << trellis.step_bits) + offsets
        for value, slope in zip(step.unbind(1), slopes, strict=True):
            total += value[:, None] * slope
        every.append(total.unflatten(1, (trellis.groups, -1)).amin(-1))
        costs = every[-1] & -(1 << trellis.step_bits)
    return costs, every


def _back(group: torch.Tensor, least: list[torch.Tensor], trellis: Trellis) -> list[torch.Tensor]:
    """The states int64 [n] of these steps on the paths whose last state is in ``group``."""
    states: list[torch.Tensor] = []
    for costs in reversed(least):
        dropped = costs.gather(1, group[:, None]).squeeze(1) % (1 << trellis.step_bits)
        states.append((group << trellis.step_bits) | dropped)
        group = states[-1] % trellis.groups
    return states[::-1]
