"""Full attention of the bodies: one projection call, per-head norms and rotary angles on queries and keys at once."""

from __future__ import annotations

from typing import Any

import torch

from turbomoe.kv.cache import KVCache
from turbomoe.kv.shape import AttentionShape
from turbomoe.models.fast.ops import Joined, RMSNorm, rotate, single

Angles = tuple[torch.Tensor, torch.Tensor]


class Attention:
    """Attention of one layer over the memory. ``norm`` works on [N, query_heads + kv_heads, head_dim]; None: none.

    ``gated``: the query projection holds, head by head, a query and a gate of the same size (Qwen3.5).
    """

    def __init__(self, module: Any, shape: AttentionShape, norm: RMSNorm | None, *, gated: bool = False) -> None:
        self.shape, self.norm, self.gated = shape, norm, gated
        self.scale = float(module.scaling)
        self.project = Joined([module.q_proj, module.k_proj, module.v_proj])
        self.out = single(module.o_proj)
        self._queries = shape.query_heads * shape.head_dim * (2 if gated else 1)
        self._keys = shape.kv_heads * shape.head_dim

    def __call__(self, x: torch.Tensor, batch: int, angles: Angles, memory: KVCache) -> torch.Tensor:
        """x [B * S, hidden], normed -> [B * S, hidden]."""
        qk, v, gate = self._heads(self.project.side_by_side(x))
        if self.norm is not None:
            qk = self.norm(qk)
        # [N, heads, D] -> [B, heads, S, D], views both.
        qk = rotate(qk, angles).unflatten(0, (batch, -1)).transpose(1, 2)
        v = v.unflatten(0, (batch, -1)).transpose(1, 2)
        q, k = qk.split_with_sizes((self.shape.query_heads, self.shape.kv_heads), 1)
        y = memory.attend(self.shape.layer, q, k, v, self.scale).reshape(len(x), -1)
        return self.out(y if gate is None else y.mul_(gate.sigmoid()))

    def _heads(self, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Queries and keys [N, query_heads + kv_heads, D], values [N, kv_heads, D], gate [N, query_heads * D]."""
        dim = self.shape.head_dim
        if not self.gated:
            heads = both.unflatten(-1, (-1, dim))
            qk, v = heads.split_with_sizes((self.shape.query_heads + self.shape.kv_heads, self.shape.kv_heads), 1)
            return qk, v, None
        q, k, v = both.split_with_sizes((self._queries, self._keys, self._keys), -1)
        q, gate = q.unflatten(-1, (-1, 2, dim)).unbind(-2)
        qk = torch.cat((q, k.unflatten(-1, (-1, dim))), 1)
        return qk, v.unflatten(-1, (-1, dim)), gate.flatten(1)


def head_norm(module: Any, shape: AttentionShape, eps: float, offset: float = 0.0) -> RMSNorm:
    """The norms of queries and keys as one, with weights [query_heads + kv_heads, head_dim] in float32."""
    q, k = (norm.weight.float() + offset for norm in (module.q_norm, module.k_norm))
    return RMSNorm(torch.cat((q.expand(shape.query_heads, -1), k.expand(shape.kv_heads, -1))), eps)
