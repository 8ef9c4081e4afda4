"""Qwen3.5, dense and mixture-of-experts: DeltaNet layers with a gated full-attention layer between them.

Its norms are stored around zero (the factor is 1 + weight); the one inside DeltaNet is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from turbomoe.kv.cache import KVCache
from turbomoe.kv.layer import Step
from turbomoe.kv.shape import AttentionShape, LayerShape
from turbomoe.models.fast.attention import Attention, head_norm
from turbomoe.models.fast.deltanet import DeltaNet
from turbomoe.models.fast.ffn import make_ffn
from turbomoe.models.fast.ops import Op, RMSNorm, Rotary


@dataclass(frozen=True)
class Layer:
    """One decoder layer; norms and FFN map [N, hidden] to [N, hidden]."""

    mixer_norm: Op
    mixer: Attention | DeltaNet
    ffn_norm: Op
    ffn: Op


class Qwen35Body:
    """All decoder layers of a Qwen3.5 text model."""

    def __init__(self, shell: Any, shapes: Sequence[LayerShape]) -> None:
        eps = float(shell.config.rms_norm_eps)
        self.rotary = Rotary(shell.model.rotary_emb)
        self.layers = [_layer(module, shape, eps) for module, shape in zip(shell.model.layers, shapes, strict=True)]

    def run(self, hidden: torch.Tensor, step: Step, memory: KVCache) -> torch.Tensor:
        """See ``Body.run``."""
        batch = len(hidden)
        x = hidden.flatten(0, 1)
        angles = self.rotary.angles(step, x.dtype)
        for layer in self.layers:
            y = layer.mixer_norm(x)
            mixer = layer.mixer
            x += mixer(y, batch, memory) if isinstance(mixer, DeltaNet) else mixer(y, batch, angles, memory)
            x += layer.ffn(layer.ffn_norm(x))
        return x.view_as(hidden)


def _layer(module: Any, shape: LayerShape, eps: float) -> Layer:
    return Layer(
        _norm(module.input_layernorm, eps),
        _attention(module.self_attn, shape, eps)
        if isinstance(shape, AttentionShape)
        else DeltaNet(module.linear_attn, shape),
        _norm(module.post_attention_layernorm, eps),
        make_ffn(module.mlp),
    )


def _attention(module: Any, shape: AttentionShape, eps: float) -> Attention:
    return Attention(module, shape, head_norm(module, shape, eps, offset=1.0), gated=True)


def _norm(module: Any, eps: float) -> RMSNorm:
    return RMSNorm(module.weight.float() + 1.0, eps)
