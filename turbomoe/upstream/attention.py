"""The seam by which stock transformers models read and write our memory.

A decoder layer calls ``cache.update(key, value, layer)`` and hands what comes back to the attention function. Our
``update`` hands back the new keys and values with a note of where they belong, and our attention function stores
and attends in one go. No mask is ever built (none is registered under our name): causality follows positions.
Seams used: ``Cache``/``CacheLayerMixin``, ``LinearAttentionLayer``, ``AttentionInterface``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer

from turbomoe.errors import ModelError
from turbomoe.kv.cache import KVCache
from turbomoe.kv.shape import AttentionShape, RecurrentShape

ATTENTION = "turbomoe"


@dataclass(frozen=True)
class FreshKV:
    """New keys and values of one layer on their way to the attention function: [B, kv_heads, S, head_dim] each."""

    memory: KVCache
    layer: int
    key: torch.Tensor
    value: torch.Tensor


class AttentionView(CacheLayerMixin):
    """One attention layer of the cache as transformers sees it, for the duration of a step."""

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self, memory: KVCache, layer: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory, self.layer = memory, layer

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is lazy: the memory was allocated with the engine."""

    def update(  # type: ignore[override]  # a handle instead of tensors, as the seam allows
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[FreshKV, FreshKV]:
        fresh = FreshKV(self.memory, self.layer, key_states, value_states)
        return fresh, fresh

    def get_seq_length(self, *args: Any) -> int:
        step = self.memory.step
        return 0 if step is None else step.reach - step.count

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return self.memory.ctx_size


class StepView(Cache):
    """The memory of the sequences of the open step, as the ``Cache`` that a stock forward pass expects."""

    def __init__(self, memory: KVCache) -> None:
        self.memory = memory
        self._recurrent: dict[int, LinearAttentionLayer] = {}
        super().__init__(layers=[self._view(shape) for shape in memory.shapes])

    def _view(self, shape: AttentionShape | RecurrentShape) -> AttentionView | LinearAttentionLayer:
        if isinstance(shape, AttentionShape):
            return AttentionView(self.memory, shape.layer)
        assert self.memory.step is not None
        conv, state = self.memory.recurrent[shape.layer].read(self.memory.step.slots)
        layer = LinearAttentionLayer()
        layer.lazy_initialization(conv_states=conv, recurrent_states=state)
        layer.conv_states[0], layer.recurrent_states[0] = conv, state
        # A slot without history is all zeros, which is a valid previous state: one path for first and later chunks.
        layer.has_previous_state[0] = True
        self._recurrent[shape.layer] = layer
        return layer

    def write_back(self) -> None:
        """Store the recurrent states that the step has changed."""
        assert self.memory.step is not None
        for index, layer in self._recurrent.items():
            conv, state = layer.conv_states[0], layer.recurrent_states[0]
            assert conv is not None and state is not None
            self.memory.recurrent[index].write(self.memory.step.slots, conv, state)


def attention(
    module: nn.Module, query: torch.Tensor, key: FreshKV, value: FreshKV, attention_mask: object, *,
    scaling: float | None = None, dropout: float = 0.0, softcap: float | None = None, s_aux: object = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """The function registered as ``turbomoe``: query [B, heads, S, head_dim] to ([B, S, heads, head_dim], None)."""
    if softcap is not None or s_aux is not None:
        raise ModelError("This model's attention uses logit soft-capping or sinks, which turbomoe cannot apply yet")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return key.memory.attend(key.layer, query, key.key, key.value, scale), None


def register() -> str:
    """Make ``attn_implementation="turbomoe"`` known to transformers. Idempotent; returns the name."""
    AttentionInterface.register(ATTENTION, attention)
    return ATTENTION
