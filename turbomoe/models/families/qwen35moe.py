"""Qwen3.5 with routed experts and one gated shared expert in every layer (35B-A3B, 122B-A10B, 397B-A17B)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from turbomoe.models.families.qwen35 import mixer, mixer_config, model
from turbomoe.models.family import ROUTED, Family, Table, routed_config
from turbomoe.models.header import GgufHeader
from turbomoe.models.placement import Dense, as_row

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_SHARED: Table = {
    "ffn_gate_inp_shexp.weight": Dense("mlp.shared_expert_gate.weight", as_row),
    "ffn_gate_shexp.weight": Dense("mlp.shared_expert.gate_proj.weight"),
    "ffn_up_shexp.weight": Dense("mlp.shared_expert.up_proj.weight"),
    "ffn_down_shexp.weight": Dense("mlp.shared_expert.down_proj.weight"),
}


def config(header: GgufHeader) -> dict[str, Any]:
    """Configuration fields of a GGUF of architecture ``qwen35moe``."""
    shared = {"shared_expert_intermediate_size": header.integer("expert_shared_feed_forward_length")}
    return mixer_config(header, "qwen3_5_moe_text") | routed_config(header) | shared


def layer(config: PretrainedConfig) -> Table:
    """A decoder layer; the shared expert stays dense, in the shell."""
    return mixer(config) | ROUTED | _SHARED


FAMILY = Family("qwen35moe", "qwen35moe", ("qwen3_5_moe_text", "qwen3_5_moe"), config, layer, model)
