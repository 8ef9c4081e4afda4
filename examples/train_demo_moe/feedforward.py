"""The FFN: dense, or routed experts beside a shared one; and rounding of its matrices to Q4_0."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from moe import Dispatch, Experts, balance_loss, dispatch
from shape import Shape
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> the same shape."""
        result: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class Router(nn.Module):
    """Scores of all experts; softmax, then the best few, whose weights are scaled to sum to one."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.active = shape.active
        self.weight = nn.Parameter(torch.randn(shape.experts, shape.hidden) * 0.02)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [tokens, hidden] -> (probabilities [tokens, experts], weights and ids [tokens, active])."""
        with torch.autocast(x.device.type, enabled=False):
            probabilities = F.linear(x.float(), self.weight).softmax(-1)
        weights, ids = probabilities.topk(self.active, dim=-1)
        return probabilities, weights / weights.sum(-1, keepdim=True), ids


class Routed(nn.Module):
    """Routed experts and one shared expert behind a gate."""

    def __init__(self, shape: Shape, product: Any) -> None:
        super().__init__()
        self.gate = Router(shape)
        self.experts = Experts(shape.experts, shape.hidden, shape.expert_width, product)
        self.shared_expert = SwiGLU(shape.hidden, shape.shared_width)
        self.shared_expert_gate = nn.Linear(shape.hidden, 1, bias=False)

    def forward(self, x: Tensor, weights: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x [batch, time, hidden] -> (output, balance loss, expert ids [batch * time, active])."""
        rows = x.flatten(0, 1)
        probabilities, shares, ids = self.gate(rows)
        plan: Dispatch = dispatch(ids, probabilities.shape[-1], self.experts.product.align)
        routed = self.experts(rows, shares, plan, weights)
        shared = self.shared_expert_gate(rows).sigmoid() * self.shared_expert(rows)
        return (routed + shared).view(x.shape), balance_loss(probabilities, plan), ids


def to_q4_0(weight: Tensor) -> Tensor:
    """Round to what Q4_0 can hold (32 values, one half-precision scale); the gradient passes as if nothing happened."""
    with torch.no_grad():
        blocks = weight.unflatten(-1, (-1, 32))
        largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        scale = largest / -8
        inverse = torch.where(scale == 0, 0, 1 / scale)
        codes = (blocks * inverse + 8.5).floor().clamp(0, 15) - 8
        change = (codes * scale.half().float()).flatten(-2) - weight
    rounded: Tensor = weight + change
    return rounded
