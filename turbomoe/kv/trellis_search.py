"""The best path through a trellis for a vector: Viterbi's algorithm over many vectors at once, in PyTorch.

The reference of the compiled encoder (``native/src/kernels_trellis.h``), which makes the same additions in the same
order, so both choose the same paths, bit for bit. The GPU's has costs of 16 bits: see ``trellis_fixed``.
"""

from __future__ import annotations

import torch

from turbomoe.kv.trellis_codebook import Trellis, codebook

HALF_SPAN = 32  # steps before and after the boundary that decide about the state there
CACHED_COSTS = 1 << 18  # vectors are searched in chunks whose costs stay in a core's cache
UNREACHABLE = torch.finfo(torch.float32).max / 4  # a cost that squares of distances do not change


def search(spread: torch.Tensor, trellis: Trellis) -> torch.Tensor:
    """The windows that stand for ``spread``, float32 [n, head_dim] of unit variance: int64 [n, steps].

    A path is a circle: its last window runs into its first. The state at that boundary is where the best path over
    the 64 steps around it stands; then the best path that starts and ends there is found.
    """
    steps = spread.unflatten(-1, (-1, trellis.values))
    rows = max(1, CACHED_COSTS // trellis.states)
    found = [_circle(chunk, trellis) for chunk in steps.split(rows)]
    return torch.cat(found)


def _circle(x: torch.Tensor, trellis: Trellis) -> torch.Tensor:
    """[n, steps, values] to windows int64 [n, steps]."""
    near = torch.arange(-HALF_SPAN, HALF_SPAN, device=x.device).remainder(x.shape[1])
    costs, choices = _forward(x[:, near], x.new_zeros(len(x), trellis.states), trellis)
    ends = costs.min(-1).indices
    boundary = _back(ends, choices[HALF_SPAN:], trellis)[0]
    start = x.new_full((len(x), trellis.states), UNREACHABLE).scatter_(1, boundary[:, None], 0.0)
    _, choices = _forward(x, start, trellis)
    return torch.stack(_back(boundary, choices, trellis)[1:], 1)


def _forward(
    x: torch.Tensor, costs: torch.Tensor, trellis: Trellis
) -> tuple[torch.Tensor, list[torch.Tensor]]:  # fmt: skip
    """Costs [n, states] after all steps, and for each step the best dropped bits of every group, int64 [n, groups]."""
    tables = codebook(trellis, str(x.device)).view(trellis.values, -1, trellis.groups)
    choices = []
    for step in x.unbind(1):
        # The lowest on ties: torch.min names the first.
        best, choice = costs.unflatten(1, (trellis.groups, -1)).min(-1)
        choices.append(choice)
        total = best[:, None]
        for value, table in zip(step.unbind(1), tables, strict=True):
            distance = value[:, None, None] - table
            total = total + distance * distance
        costs = total.flatten(1)
    return costs, choices


def _back(ends: torch.Tensor, choices: list[torch.Tensor], trellis: Trellis) -> list[torch.Tensor]:
    """The states int64 [n] before each of these steps and after the last, on the paths that end in ``ends``."""
    states = [ends]
    for choice in reversed(choices):
        group = states[-1] % trellis.groups
        dropped = choice.gather(1, group[:, None]).squeeze(1)
        states.append((group << trellis.step_bits) | dropped)
    return states[::-1]
