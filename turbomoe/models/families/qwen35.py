"""Qwen3.5, dense: Gated DeltaNet layers with a gated full-attention layer every fourth.

The converter differs from the hub in four ways, undone in ``layer``: zero-centred norms are stored as 1 + w
(all but the one inside DeltaNet), decays as -exp(w), the convolution without its middle axis, and value heads
in tiled order instead of grouped by key head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from turbomoe.models.family import ATTENTION, EMBEDDINGS, MLP, QK_NORM, Family, Table, decoder_config, head_dim
from turbomoe.models.header import MAX_HEADS, GgufHeader
from turbomoe.models.placement import Dense, chain, log_negated, minus_one, new_axis, value_heads

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_NORMS: Table = {
    "attn_norm.weight": Dense("input_layernorm.weight", minus_one),
    "post_attention_norm.weight": Dense("post_attention_layernorm.weight", minus_one),
}


def config(header: GgufHeader) -> dict[str, Any]:
    """Configuration fields of a GGUF of architecture ``qwen35``."""
    return mixer_config(header, "qwen3_5_text") | {"intermediate_size": header.integer("feed_forward_length")}


def mixer_config(header: GgufHeader, model_type: str) -> dict[str, Any]:
    """Configuration fields that the dense and the mixture-of-experts family share: all but the FFN's."""
    fields = decoder_config(header, model_type)
    period = header.integer("full_attention_interval", default=4)
    layers = range(fields["num_hidden_layers"])
    kinds = ["linear_attention" if (layer + 1) % period else "full_attention" for layer in layers]
    return fields | _deltanet(header) | {"layer_types": kinds, "rope_parameters": _rope(header)}


def _deltanet(header: GgufHeader) -> dict[str, Any]:
    keys = header.integer("ssm.group_count", high=MAX_HEADS)
    values = header.integer("ssm.time_step_rank", high=MAX_HEADS)
    inner = header.integer("ssm.inner_size")
    if values % keys or inner % values:
        raise header.wrong("ssm.time_step_rank", f"{keys} key heads and {inner} values cannot share {values} heads")
    return {
        "linear_conv_kernel_dim": header.integer("ssm.conv_kernel", high=64),
        "linear_key_head_dim": header.integer("ssm.state_size"),
        "linear_num_key_heads": keys,
        "linear_num_value_heads": values,
        "linear_value_head_dim": inner // values,
    }


def _rope(header: GgufHeader) -> dict[str, Any]:
    """Part of each head is rotated; the sections (time, height, width) matter to images only."""
    size = head_dim(header)
    rotated = header.integer("rope.dimension_count", high=size)
    sections = header.integers("rope.dimension_sections", most=4, low=0, high=size)
    return {
        "rope_type": "default",
        "rope_theta": header.number("rope.freq_base"),
        "partial_rotary_factor": rotated / size,
        "mrope_section": [section for section in sections if section],
        "mrope_interleaved": True,
    }


def layer(config: PretrainedConfig) -> Table:
    """A decoder layer of the dense family."""
    return mixer(config) | MLP


def mixer(config: PretrainedConfig) -> Table:
    """Norms, attention and DeltaNet: everything but the FFN."""
    heads = {leaf: replace(to, transform=minus_one) for leaf, to in QK_NORM.items() if isinstance(to, Dense)}
    return _NORMS | ATTENTION | heads | _deltanet_table(config)


def _deltanet_table(config: PretrainedConfig) -> Table:
    keys, size = config.linear_num_key_heads, config.linear_value_head_dim
    per_key = config.linear_num_value_heads // keys
    fixed = 2 * keys * config.linear_key_head_dim  # rows of queries and keys, which stay where they are
    per_head = value_heads(keys, per_key, 1)
    rows = value_heads(keys, per_key, size)
    tail = value_heads(keys, per_key, size, offset=fixed)
    return {
        "attn_qkv.weight": Dense("linear_attn.in_proj_qkv.weight", tail),
        "attn_gate.weight": Dense("linear_attn.in_proj_z.weight", rows),
        "ssm_alpha.weight": Dense("linear_attn.in_proj_a.weight", per_head),
        "ssm_beta.weight": Dense("linear_attn.in_proj_b.weight", per_head),
        "ssm_conv1d.weight": Dense("linear_attn.conv1d.weight", chain(tail, new_axis(1))),
        "ssm_dt.bias": Dense("linear_attn.dt_bias", per_head),
        "ssm_a": Dense("linear_attn.A_log", chain(log_negated, per_head)),
        "ssm_norm.weight": Dense("linear_attn.norm.weight"),
        "ssm_out.weight": Dense("linear_attn.out_proj.weight", value_heads(keys, per_key, size, axis=1)),
    }


def model(config: PretrainedConfig) -> dict[str, Dense]:
    """The tensors outside the layers."""
    return EMBEDDINGS | {"output_norm.weight": Dense("model.norm.weight", minus_one)}


FAMILY = Family("qwen35", "qwen35", ("qwen3_5_text", "qwen3_5"), config, layer, model)
