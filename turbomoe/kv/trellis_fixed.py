"""The search of ``trellis_search`` with costs of 16 bits, as the GPU does it: a register holds those of two vectors.

x is clipped to +-4; x and the values v are scaled and rounded. Half precision makes a distance of a value: e = x - v,
then e^2 + base, saturated at 1. The base lies ``most`` patterns of bits below 1, so that patterns say (x - v)^2 in
``UNITS``, from one half on in twice that, and no more than ``most``. A step's distance, the sum over its values, is
shifted by ``step_bits``, so that the lowest bits of a cost can name the state within its group: one minimum finds the
least cost and who has it, the lowest state on ties. The error of Gaussian vectors grows by
0.03% (tcq2), 0.15% (tcq2.5), 0.07% (tcq3) and 0.23% (tcq4; 3,072 vectors of 256 values, standard error 0.01%). Paths
through several outliers in a row suffer where distances saturate; by how much, ``test_encode_kernel.py`` says.

The range, in the largest distance of a step: ``steps_to_all`` steps lead from every group to every group, so costs
differ by at most so many. The least is taken from all every ``renewed`` steps. Each step after that adds one at most,
but from the last of ``steps_to_all`` on a path from the least group bounds all costs by the number of steps. So sums
are at most ``renewed``, or 2 ``steps_to_all`` if that is more; ``steps_to_all`` + 1 with a renewal every step. A group
without a path starts with a little more than any path of ``steps_to_all`` steps, after which all have one. With a
renewal every step there is no room for what such a group gains until then: it is held at where it started.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from turbomoe.kv.trellis_codebook import Trellis, codebook
from turbomoe.kv.trellis_search import HALF_SPAN

LARGEST = 4.0  # of x
GRID = 2.0**-10  # of scaled numbers: sums and squares of those that do not saturate are exact in float32
ONE = 0x3C00  # in half precision
ROOM = 1 << 16  # costs

# By step_bits: (x - v)^2 that counts as one, and steps between renewals. Small values say more of near ones; large ones
# tell more of those that are far, which some vectors need.
UNITS = {2: 1 / 128, 3: 1 / 256, 4: 1 / 512, 5: 1 / 64}
RENEWED = {2: 8, 3: 4, 4: 1, 5: 2}


@dataclass(frozen=True)
class FixedTrellis:
    """What the arithmetic needs to know; ``scale`` is that of x and of the values."""

    scale: float
    most: int
    renewed: int
    steps_to_all: int
    unreachable: int  # a cost, shifted
    levels: tuple[tuple[float, ...], ...]  # for each value of a step the different scaled v
    numbers: tuple[tuple[int, ...], ...]  # for each value of a step and window, which of them is its own

    @property
    def base(self) -> int:
        """The bits of what squares are added to."""
        return ONE - self.most

    @property
    def limited(self) -> int:
        """After so many first steps costs are kept from growing above ``unreachable``."""
        return self.steps_to_all - 1 if self.renewed < self.steps_to_all else 0


@lru_cache(maxsize=32)
def fixed(trellis: Trellis) -> FixedTrellis:
    to_all, renewed = -(-trellis.window_bits // trellis.step_bits) - 1, RENEWED[trellis.step_bits]
    longest = to_all + renewed if renewed < to_all else max(2 * to_all, renewed)
    most = min(2047, ((ROOM >> trellis.step_bits) - 2) // longest // trellis.values)
    finest = 2.0**-12 if most > 1023 else 2.0**-11
    scale = math.sqrt(finest / UNITS[trellis.step_bits])
    found = [row.unique(return_inverse=True) for row in _to_grid(codebook(trellis) * scale)]
    levels, numbers = (tuple(tuple(row.tolist()) for row in rows) for rows in zip(*found, strict=True))
    unreachable = to_all * trellis.values * most + 1 << trellis.step_bits
    return FixedTrellis(scale, most, renewed, to_all, unreachable, levels, numbers)


def _to_grid(x: torch.Tensor) -> torch.Tensor:
    return (x / GRID).round() * GRID


def to_halves(spread: torch.Tensor, trellis: Trellis) -> torch.Tensor:
    """Coordinates of unit variance as float16, clipped, scaled and rounded."""
    return _to_grid(spread.clamp(-LARGEST, LARGEST) * fixed(trellis).scale).half()


def distances(x: torch.Tensor, trellis: Trellis) -> torch.Tensor:
    """From the float16 [n, values] of a step to all windows: int32 [n, states], the lowest ``step_bits`` free."""
    parts = fixed(trellis)
    base = torch.tensor(parts.base, dtype=torch.int16).view(torch.float16).float()
    v = _to_grid(codebook(trellis, str(x.device)) * parts.scale)
    e = (x.float()[:, :, None] - v).half().float()
    patterns = (e * e + base).clamp(max=1).half().view(torch.int16).int()
    return (patterns - parts.base).sum(1, dtype=torch.int32) << trellis.step_bits


def search_fixed(spread: torch.Tensor, trellis: Trellis) -> torch.Tensor:
    """Like ``trellis_search.search``, with the paths that the GPU finds: the reference of ``kernels/encode.py``."""
    x = to_halves(spread, trellis).unflatten(-1, (-1, trellis.values))
    near = torch.arange(-HALF_SPAN, HALF_SPAN, device=x.device).remainder(x.shape[1])
    start = torch.zeros(len(x), trellis.groups, dtype=torch.int32, device=x.device)
    costs, least = forward(x[:, near], start, trellis)
    state = _back(costs.min(-1).indices, least[HALF_SPAN - 1 :], trellis)[0]
    start = torch.full_like(start, fixed(trellis).unreachable).scatter_(1, state[:, None] >> trellis.step_bits, 0)
    _, least = forward(x, start, trellis)
    return torch.stack([*_back(state % trellis.groups, least[:-1], trellis), state], 1)


def forward(x: torch.Tensor, costs: torch.Tensor, trellis: Trellis) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Float16 [n, steps, values] and costs int32 [n, groups], modulo 2^16: costs after all steps, and those of each
    step with the state's bits in them.
    """
    many, parts = 1 << trellis.step_bits, fixed(trellis)
    own = torch.arange(trellis.groups, dtype=torch.int32, device=x.device) % many
    every = []
    for number, step in enumerate(x.unbind(1), start=1):
        total = (costs | own).repeat(1, many) + distances(step, trellis) & 0xFFFF
        every.append(total.unflatten(1, (trellis.groups, many)).amin(-1))
        costs = every[-1] & -many
        if number % parts.renewed == 0:
            costs = costs - costs.amin(1, keepdim=True)
            if number <= parts.limited:
                costs = costs.clamp(max=parts.unreachable)
    return costs, every


def _back(group: torch.Tensor, least: list[torch.Tensor], trellis: Trellis) -> list[torch.Tensor]:
    """The states int64 [n] of these steps on the paths whose last state is in ``group``."""
    states: list[torch.Tensor] = []
    for costs in reversed(least):
        dropped = costs.gather(1, group[:, None]).squeeze(1) % (1 << trellis.step_bits)
        states.append((group << trellis.step_bits) | dropped)
        group = states[-1] % trellis.groups
    return states[::-1]
