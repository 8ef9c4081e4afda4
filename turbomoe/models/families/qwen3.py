"""Qwen3, dense: a norm on each query and key head, no biases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from turbomoe.models.family import (
    ATTENTION,
    MLP,
    NORMS,
    QK_NORM,
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
    """Configuration fields of a GGUF of architecture ``qwen3``."""
    return decoder_config(header, "qwen3") | {
        "intermediate_size": header.integer("feed_forward_length"),
        "rope_parameters": rope_parameters(header, default_base=1_000_000.0),
    }


def layer(config: PretrainedConfig) -> Table:
    """Nothing is rearranged."""
    return NORMS | ATTENTION | QK_NORM | MLP


FAMILY = Family("qwen3", "qwen3", ("qwen3",), config, layer, outer)
