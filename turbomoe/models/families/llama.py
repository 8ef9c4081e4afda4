"""Llama and what shares its architecture (SmolLM2, Llama 2 and 3, Mistral as GGUF)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from turbomoe.models.family import (
    ATTENTION,
    MLP,
    NORMS,
    OUTER,
    QKV_BIAS,
    Family,
    Table,
    decoder_config,
    refuse,
    rope_parameters,
)
from turbomoe.models.header import GgufHeader
from turbomoe.models.placement import Dense, Transform, rope_pairs

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def config(header: GgufHeader) -> dict[str, Any]:
    """Configuration fields of a GGUF of architecture ``llama``."""
    refuse(header, "expert_count", "A mixture of experts under this name (Mixtral)")
    rope = rope_parameters(header)
    if rope["rope_type"] == "yarn" and header.has_tensor("rope_freqs.weight"):
        raise header.wrong("rope.scaling.type", "YaRN on top of the divisors in rope_freqs.weight is not supported")
    return decoder_config(header, "llama") | {
        "intermediate_size": header.integer("feed_forward_length"),
        "rope_parameters": rope,
        "attention_bias": header.has_tensor("blk.0.attn_q.bias"),
        "mlp_bias": header.has_tensor("blk.0.ffn_gate.bias"),
    }


def layer(config: PretrainedConfig) -> Table:
    """Queries and keys are stored with rotary pairs side by side; transformers wants split halves."""
    queries, keys = rope_pairs(config.num_attention_heads), rope_pairs(config.num_key_value_heads)
    biases: Table = {
        "attn_output.bias": Dense("self_attn.o_proj.bias"),
        "ffn_gate.bias": Dense("mlp.gate_proj.bias"),
        "ffn_up.bias": Dense("mlp.up_proj.bias"),
        "ffn_down.bias": Dense("mlp.down_proj.bias"),
    }
    rotary: Table = {
        f"attn_{short}.{leaf}": Dense(f"self_attn.{short}_proj.{leaf}", transform)
        for short, transform in (("q", queries), ("k", keys))
        for leaf in ("weight", "bias")
    }
    return NORMS | ATTENTION | QKV_BIAS | MLP | biases | rotary


def model(config: PretrainedConfig) -> dict[str, Dense]:
    """Llama 3 files carry its long-context scaling as one divisor for each rotary frequency.

    It divides what a linear factor, if the file has one too, has already divided.
    """
    return OUTER | {"rope_freqs.weight": Dense("model.rotary_emb.inv_freq", _divide_frequencies(config))}


def _divide_frequencies(config: PretrainedConfig) -> Transform:
    size, base = config.head_dim, config.rope_parameters["rope_theta"]
    frequencies = 1.0 / base ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    if config.rope_parameters["rope_type"] == "linear":
        frequencies = frequencies / config.rope_parameters["factor"]
    return lambda divisors: frequencies.to(divisors.device) / divisors


FAMILY = Family("llama", "llama", ("llama",), config, layer, model)
