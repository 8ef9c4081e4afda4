"""Muon (Jordan 2024; scale of Liu et al. 2025): momentum whose update is made orthogonal, for the matrices of a model.

Matrices of one size are stacked, so a step is a few batched products however many experts there are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """[n, rows, columns], rows <= columns -> the nearest matrices with all singular values near one, bfloat16."""
    x = matrices.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    result: Tensor = x
    return result


class Muon:
    """Updates of size 0.2 (root mean square) times the learning rate, as AdamW's are, and decoupled weight decay.

    ``parts`` [rows, columns] or [experts, rows, columns]; a fused gate and up matrix counts as two.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], momentum: float = 0.95) -> None:
        self._momentum = momentum
        self._groups: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
        self._fused: set[nn.Parameter] = set()
        for name, parameter in parameters:
            if name.endswith("gate_up_proj"):
                self._fused.add(parameter)
            rows, columns = self._matrices(parameter, parameter).shape[-2:]
            self._groups[(rows, columns)].append((parameter, torch.zeros_like(parameter)))

    def _matrices(self, parameter: nn.Parameter, values: Tensor) -> Tensor:
        """``values``, shaped like ``parameter``, as [n, short side, long side]."""
        if parameter in self._fused:
            values = values.unflatten(1, (2, -1))
        values = values.reshape(-1, *values.shape[-2:])
        return values.mT if values.shape[-2] > values.shape[-1] else values

    @torch.no_grad()
    def step(self, rate: float, decay: float = 0.1) -> None:
        """One update from the gradients; ``rate`` is the learning rate."""
        for (_, columns), group in self._groups.items():
            updates = orthogonal(torch.cat([self._direction(*pair) for pair in group]))
            start = 0
            for parameter, _ in group:
                view = self._matrices(parameter, parameter.data)
                part = updates[start : start + len(view)]
                start += len(view)
                view.mul_(1 - rate * decay).add_(part, alpha=-rate * 0.2 * columns**0.5)

    def _direction(self, parameter: nn.Parameter, buffer: Tensor) -> Tensor:
        assert parameter.grad is not None
        buffer.lerp_(parameter.grad, 1 - self._momentum)
        return self._matrices(parameter, parameter.grad.lerp(buffer, self._momentum))
