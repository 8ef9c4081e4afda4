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
from turbomoe.models.fast.native import Angles, Layers, NativeDecoder, make_decoder
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
        attention = [shape for shape in shapes if isinstance(shape, AttentionShape)]
        modules = list(shell.model.layers)
        self.layers = [_layer(module, shape, eps) for module, shape in zip(modules, attention, strict=True)]
        norms = [None if layer.attention.norm is None else layer.attention.norm.weight for layer in self.layers]
        self.decoder = make_decoder(modules, attention, norms, eps, self.rotary.channels)

    def run(self, hidden: torch.Tensor, step: Step, memory: KVCache) -> torch.Tensor:
        """See ``Body.run``."""
        batch = len(hidden)
        x = hidden.flatten(0, 1)
        angles = self.rotary.angles(step, x.dtype)
        if self.decoder is not None and (program := self.decoder.program(memory, step, x)) is not None:
            self._decode(self.decoder, program, x, step, angles)
            return x.view_as(hidden)
        for layer in self.layers:
            x += layer.attention(layer.mixer_norm(x), batch, angles, memory)
            x += layer.ffn(layer.ffn_norm(x))
        return x.view_as(hidden)

    def _decode(self, decoder: NativeDecoder, program: Layers, x: torch.Tensor, step: Step, angles: Angles) -> None:
        """Runs of layers in the C core, each up to an FFN that is computed here."""
        first = 0
        for i, layer in enumerate(self.layers):
            if decoder.computes_ffn[i] and i + 1 < len(self.layers):
                continue
            decoder.run(program, range(first, i + 1), x, step, angles)
            first = i + 1
            if not decoder.computes_ffn[i]:
                x += layer.ffn(layer.ffn_norm(x))


def _layer(module: Any, shape: AttentionShape, eps: float) -> Layer:
    attention = module.self_attn
    norm = head_norm(attention, shape, eps) if hasattr(attention, "q_norm") else None
    return Layer(
        RMSNorm(module.input_layernorm.weight, eps),
        Attention(attention, shape, norm),
        RMSNorm(module.post_attention_layernorm.weight, eps),
        make_ffn(module.mlp),
    )
