"""The search of ``trellis_search`` with costs of 16 bits, as the GPU does it: a register holds those of two vectors.

x is clipped to +-4; x and the values v are scaled and rounded to 2^-9. Half precision makes a distance of a value: e = x
- v, then e^2 + base, saturated at 1. The base lies ``most`` steps of 2^-11 below 1, so the patterns of bits say e^2 in
2^-11, and no more than ``most``: a value that is ``reach`` away or farther has merely lost. A step's distance, the sum
over its values, is shifted by ``step_bits``, so that the lowest bits of a cost can name the state within its group:
one minimum finds the least cost and who has it, the lowest state on ties. The error of Gaussian vectors grows by
0.02% (tcq3), 0.03% (tcq2), 0.05% (tcq2.5) and 0.07% (tcq4; 3,000 vectors of 256).

The range, in distances of a step, at most 1,023 each: ``steps_to_all`` steps lead from every group to every group, so
costs differ by at most so many. The least is taken from all every ``renewed`` steps. Steps after that add one each, and
from the last of ``steps_to_all`` on a path from the least group bounds all costs by the number of steps. So costs end
at ``renewed`` or 2 ``steps_to_all`` - 1, whichever is more: for our trellises the former, and 2^16 has room for it. A
group without a path starts with 2^15, more than ``steps_to_all`` of them and with room for as many.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from turbomoe.kv.trellis_codebook import Trellis, codebook
from turbomoe.kv.trellis_search import HALF_SPAN

LARGEST = 4.0  # of x
GRID = 2.0**-9  # of scaled numbers: sums and squares of those that do not saturate are exact in float32
ONE = 0x3C00  # in half precision
UNREACHABLE = 1 << 15


@dataclass(frozen=True)
class FixedTrellis:
    """What the arithmetic needs to know; ``scale`` is that of x and of the values."""

    scale: float
    most: int
    renewed: int
    steps_to_all: int
    levels: tuple[tuple[float, ...], ...]  # for each value of a step the different scaled v
    numbers: tuple[tuple[int, ...], ...]  # for each value of a step and window, which of them is its own

    @property
    def base(self) -> int:
        """The bits of what squares are added to."""
        return ONE - self.most


@lru_cache(maxsize=32)
def fixed(trellis: Trellis) -> FixedTrellis:
    most = 1024 // trellis.values - 1
    # Half the error for each bit more; below 1 even good paths of tcq4 meet values that far away.
    reach = max(1.0, 2 ** (3.5 - trellis.step_bits / trellis.values))
    scale = math.sqrt((most + 1) / 2048) / reach
    found = [row.unique(return_inverse=True) for row in _to_grid(codebook(trellis) * scale)]
    levels, numbers = (tuple(tuple(row.tolist()) for row in rows) for rows in zip(*found, strict=True))
    steps_to_all = -(-trellis.window_bits // trellis.step_bits) - 1
    return FixedTrellis(scale, most, 64 >> trellis.step_bits, steps_to_all, levels, numbers)


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
    start = torch.full_like(start, UNREACHABLE).scatter_(1, state[:, None] >> trellis.step_bits, 0)
    _, least = forward(x, start, trellis)
    return torch.stack([*_back(state % trellis.groups, least[:-1], trellis), state], 1)


def forward(x: torch.Tensor, costs: torch.Tensor, trellis: Trellis) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Float16 [n, steps, values] and costs int32 [n, groups], modulo 2^16: costs after all steps, and those of each
    step with the state's bits in them.
    """
    many = 1 << trellis.step_bits
    own = torch.arange(trellis.groups, dtype=torch.int32, device=x.device) % many
    every = []
    for number, step in enumerate(x.unbind(1), start=1):
        total = (costs | own).repeat(1, many) + distances(step, trellis) & 0xFFFF
        every.append(total.unflatten(1, (trellis.groups, many)).amin(-1))
        costs = every[-1] & -many
        if number % fixed(trellis).renewed == 0:
            costs = costs - costs.amin(1, keepdim=True)
    return costs, every


def _back(group: torch.Tensor, least: list[torch.Tensor], trellis: Trellis) -> list[torch.Tensor]:
    """The states int64 [n] of these steps on the paths whose last state is in ``group``."""
    states: list[torch.Tensor] = []
    for costs in reversed(least):
        dropped = costs.gather(1, group[:, None]).squeeze(1) % (1 << trellis.step_bits)
        states.append((group << trellis.step_bits) | dropped)
        group = states[-1] % trellis.groups
    return states[::-1]
