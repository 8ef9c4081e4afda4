"""Gated full attention for training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from norms import Norm
from shape import Shape
from torch import Tensor, nn


class Attention(nn.Module):
    """Causal attention with normalised queries and keys, partial rotation and an output gate."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = shape.heads, shape.kv_heads, shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, 2 * self.heads * self.dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden, self.kv_heads * self.dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden, self.kv_heads * self.dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.dim, shape.hidden, bias=False)
        self.q_norm, self.k_norm = Norm(self.dim), Norm(self.dim)
        self.rotated, self.theta = int(self.dim * shape.rotated), shape.rope_theta

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, time, hidden] -> the same shape."""
        query, gate = self.q_proj(x).unflatten(-1, (self.heads, 2 * self.dim)).chunk(2, dim=-1)
        key = self.k_proj(x).unflatten(-1, (self.kv_heads, self.dim))
        value = self.v_proj(x).unflatten(-1, (self.kv_heads, self.dim)).transpose(1, 2)
        query, key = (self._rotate(norm(part)) for norm, part in ((self.q_norm, query), (self.k_norm, key)))
        repeat = self.heads // self.kv_heads
        key, value = (part.repeat_interleave(repeat, dim=1) for part in (key.to(value.dtype), value))
        out = F.scaled_dot_product_attention(query.to(value.dtype), key, value, is_causal=True)
        result: Tensor = self.o_proj(out.transpose(1, 2).flatten(2) * gate.flatten(2).sigmoid())
        return result

    def _rotate(self, x: Tensor) -> Tensor:
        """[batch, time, heads, dim] -> [batch, heads, time, dim] with the first ``rotated`` values turned."""
        x = x.transpose(1, 2)
        half = self.rotated // 2
        steps = torch.arange(half, device=x.device, dtype=torch.float32) / half
        angle = torch.arange(x.shape[2], device=x.device, dtype=torch.float32)[:, None] * self.theta**-steps
        first, second, rest = x.split([half, half, self.dim - self.rotated], dim=-1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
