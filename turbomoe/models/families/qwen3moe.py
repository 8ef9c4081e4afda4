"""Qwen3 with routed experts in every layer (Qwen3-30B-A3B, Qwen3-235B-A22B)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from turbomoe.models.family import (
    ATTENTION,
    NORMS,
    QK_NORM,
    ROUTED,
    Family,
    Table,
    decoder_config,
    outer,
    rope_parameters,
    routed_config,
)
from turbomoe.models.header import GgufHeader

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def config(header: GgufHeader) -> dict[str, Any]:
    """Configuration fields of a GGUF of architecture ``qwen3moe``.

    The format has no key for it in this architecture: every such model normalises the weights of its top k.
    """
    routed = routed_config(header)
    return (
        decoder_config(header, "qwen3_moe")
        | routed
        | {
            "intermediate_size": header.integer("feed_forward_length", default=routed["moe_intermediate_size"]),
            "norm_topk_prob": header.flag("expert_weights_norm", default=True),
            "rope_parameters": rope_parameters(header, default_base=1_000_000.0),
        }
    )


def layer(config: PretrainedConfig) -> Table:
    """Nothing is rearranged."""
    return NORMS | ATTENTION | QK_NORM | ROUTED


FAMILY = Family("qwen3moe", "qwen3moe", ("qwen3_moe",), config, layer, outer)
