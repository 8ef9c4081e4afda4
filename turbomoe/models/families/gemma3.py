"""Gemma 3 text models: sliding windows between full layers, two rotary bases, norms of the form 1 + w."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from turbomoe.models.family import (
    ATTENTION,
    EMBEDDINGS,
    MLP,
    QK_NORM,
    Family,
    Table,
    decoder_config,
    head_dim,
    rope_parameters,
)
from turbomoe.models.header import MAX_HEADS, GgufHeader
from turbomoe.models.placement import Dense, minus_one

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_NORMS = {
    "attn_norm.weight": Dense("input_layernorm.weight", minus_one),
    "post_attention_norm.weight": Dense("post_attention_layernorm.weight", minus_one),
    "ffn_norm.weight": Dense("pre_feedforward_layernorm.weight", minus_one),
    "post_ffw_norm.weight": Dense("post_feedforward_layernorm.weight", minus_one),
}
# The 27B model alone scales its scores by the hidden size per head; files tell it by its number of layers.
_LAYERS_OF_27B = 62


def config(header: GgufHeader) -> dict[str, Any]:
    """Configuration fields of a GGUF of architecture ``gemma3``."""
    fields = decoder_config(header, "gemma3_text")
    return fields | {
        "intermediate_size": header.integer("feed_forward_length"),
        "sliding_window": header.integer("attention.sliding_window"),
        "layer_types": _layer_types(header, fields["num_hidden_layers"]),
        "query_pre_attn_scalar": _score_scalar(header, fields["num_hidden_layers"]),
        "rope_parameters": {
            "full_attention": rope_parameters(header, default_base=1_000_000.0),
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": header.number("rope.freq_base_swa", default=10_000.0),
            },
        },
        "final_logit_softcapping": _softcap(header),
    }


def layer(config: PretrainedConfig) -> Table:
    """The converter stores every norm as 1 + w."""
    heads = {leaf: replace(to, transform=minus_one) for leaf, to in QK_NORM.items() if isinstance(to, Dense)}
    return ATTENTION | MLP | _NORMS | heads


def model(config: PretrainedConfig) -> dict[str, Dense]:
    """The tensors outside the layers."""
    return EMBEDDINGS | {"output_norm.weight": Dense("model.norm.weight", minus_one)}


def _layer_types(header: GgufHeader, layers: int) -> list[str]:
    """Every sixth layer sees everything, unless the file gives another period or says it layer by layer."""
    key = "attention.sliding_window_pattern"
    if header.is_array(key):
        slides = [bool(item) for item in header.items(key, length=layers)]
    else:
        period = header.integer(key, default=6)
        slides = [bool((index + 1) % period) for index in range(layers)]
    return ["sliding_attention" if slide else "full_attention" for slide in slides]


def _score_scalar(header: GgufHeader, layers: int) -> int:
    if layers == _LAYERS_OF_27B:
        return header.integer("embedding_length") // header.integer("attention.head_count", high=MAX_HEADS)
    return head_dim(header)


def _softcap(header: GgufHeader) -> float | None:
    return header.number("final_logit_softcapping") if header.has("final_logit_softcapping") else None


FAMILY = Family("gemma3", "gemma3", ("gemma3_text", "gemma3"), config, layer, model)
