"""Llama, Qwen2, Qwen3 and Qwen3-MoE: pre-norm attention, then a gated FFN or routed experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from turbomoe.kv.cache import KVCache
from turbomoe.kv.layer import Step
from turbomoe.kv.shape import AttentionShape, LayerShape
from turbomoe.models.fast.attention import Attention, head_norm
from turbomoe.models.fast.ffn import make_ffn
from turbomoe.models.fast.ops import Op, RMSNorm, Rotary


@dataclass(frozen=True)
class Layer:
    """One decoder layer; norms and FFN map [N, hidden] to [N, hidden]."""

    mixer_norm: Op
    attention: Attention
    ffn_norm: Op
    ffn: Op


class LlamaBody:
    """All decoder layers of a model whose layers differ in their weights only."""

    def __init__(self, shell: Any, shapes: Sequence[LayerShape]) -> None:
        eps = float(shell.config.rms_norm_eps)
        self.rotary = Rotary(shell.model.rotary_emb)
        pairs = zip(shell.model.layers, shapes, strict=True)
        self.layers = [_layer(module, shape, eps) for module, shape in pairs if isinstance(shape, AttentionShape)]

    def run(self, hidden: torch.Tensor, step: Step, memory: KVCache) -> torch.Tensor:
        """See ``Body.run``."""
        batch = len(hidden)
        x = hidden.flatten(0, 1)
        angles = self.rotary.angles(step, x.dtype)
        for layer in self.layers:
            x += layer.attention(layer.mixer_norm(x), batch, angles, memory)
            x += layer.ffn(layer.ffn_norm(x))
        return x.view_as(hidden)


def _layer(module: Any, shape: AttentionShape, eps: float) -> Layer:
    attention = module.self_attn
    norm = head_norm(attention, shape, eps) if hasattr(attention, "q_norm") else None
    return Layer(
        RMSNorm(module.input_layernorm.weight, eps),
        Attention(attention, shape, norm),
        RMSNorm(module.post_attention_layernorm.weight, eps),
        make_ffn(module.mlp),
    )
