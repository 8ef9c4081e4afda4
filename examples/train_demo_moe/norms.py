"""Root mean square norms, plain and gated."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from shape import EPSILON
from torch import Tensor, nn


class Norm(nn.Module):
    """Root mean square norm whose weight is zero-centred: x / rms(x) * (1 + w), in float32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> the same shape, float32."""
        return F.rms_norm(x.float(), (x.shape[-1],), 1 + self.weight.float(), EPSILON)


class GatedNorm(nn.Module):
    """x / rms(x) * w * silu(gate), over one head."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x and gate [..., size] -> float32."""
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), EPSILON) * F.silu(gate.float())
