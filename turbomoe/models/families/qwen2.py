"""Qwen2 and Qwen2.5, dense: biases on queries, keys and values, none on the output projection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from turbomoe.models.family import (
    ATTENTION,
    MLP,
    NORMS,
    QKV_BIAS,
    Family,
    Table,
    decoder_config,
    outer,
    rope_parameters,
)
from turbomoe.models.header import GgufHeader

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def config(header: GgufHeader) -> dict[str, Any]:
    """Configuration fields of a GGUF of architecture ``qwen2``."""
    return decoder_config(header, "qwen2") | {
        "intermediate_size": header.integer("feed_forward_length"),
        "rope_parameters": rope_parameters(header),
    }


def layer(config: PretrainedConfig) -> Table:
    """Nothing is rearranged."""
    return NORMS | ATTENTION | QKV_BIAS | MLP


FAMILY = Family("qwen2", "qwen2", ("qwen2",), config, layer, outer)
