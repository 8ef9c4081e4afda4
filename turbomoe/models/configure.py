"""The text configuration of a model file, whichever format it is in, within limits that a machine can build."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from turbomoe.errors import ModelError
from turbomoe.files.base import ModelSource
from turbomoe.models.family import Family
from turbomoe.models.header import MAX_CONTEXT, MAX_EXPERTS, MAX_HEADS, MAX_LAYERS, MAX_WIDTH, GgufHeader
from turbomoe.upstream.shell import make_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Keys that describe how a checkpoint was written or would run code of its own, not what the model is.
_NOT_THE_MODEL = ("auto_map", "architectures", "dtype", "torch_dtype", "transformers_version")
# Attention that our own implementation does not compute: going on would be silently wrong.
_NOT_COMPUTED = {
    "use_bidirectional_attention": "attention in both directions",
    "attn_logit_softcapping": "soft caps on attention scores",
}
# Whatever else transformers knows recomputes frequencies from the length of a pass, which in our passes is no fact
# about the sequence (dynamic, longrope), or rotates in ways that no family here has.
ROPE_TYPES = ("default", "linear", "yarn", "llama3")
LIMITS = {
    "num_hidden_layers": MAX_LAYERS,
    "hidden_size": MAX_WIDTH,
    "intermediate_size": MAX_WIDTH,
    "moe_intermediate_size": MAX_WIDTH,
    "shared_expert_intermediate_size": MAX_WIDTH,
    "head_dim": MAX_WIDTH,
    "vocab_size": 1 << 24,
    "num_attention_heads": MAX_HEADS,
    "num_key_value_heads": MAX_HEADS,
    "num_experts": MAX_EXPERTS,
    "num_experts_per_tok": MAX_EXPERTS,
    "max_position_embeddings": MAX_CONTEXT,
    "linear_num_key_heads": MAX_HEADS,
    "linear_num_value_heads": MAX_HEADS,
    "linear_key_head_dim": MAX_WIDTH,
    "linear_value_head_dim": MAX_WIDTH,
    "linear_conv_kernel_dim": 64,
}


def read_config(source: ModelSource, family: Family) -> PretrainedConfig:
    """The configuration of ``source``; ``ModelError`` names a key that is missing, wrong or out of range."""
    if source.kind == "gguf":
        fields: Mapping[str, Any] = family.config(GgufHeader(source))
    else:
        fields = _hub_fields(source, family)
    _check_limits(fields)
    for key in ("rope_parameters", "rope_scaling"):
        _check_rope(fields.get(key), source)
    config = make_config(fields)
    _check_rope(getattr(config, "rope_parameters", None), source)
    _check_limits({key: getattr(config, key, None) for key in LIMITS})
    for key, what in _NOT_COMPUTED.items():
        if getattr(config, key, None):
            raise ModelError(f"Models with {what} are not supported", why=f"{source.path} sets {key}")
    return config


def _hub_fields(source: ModelSource, family: Family) -> dict[str, Any]:
    """The text part of a config.json, of a composite model too."""
    whole = source.metadata.get("config", {})
    text = whole.get("text_config", whole)
    if not isinstance(text, dict):
        raise ModelError(f"text_config in the config.json of {source.path} is not an object")
    if "quantization_config" in whole or "quantization_config" in text:
        raise ModelError(
            f"{source.path} holds weights quantised in a way that turbomoe does not read",
            why="Its config.json has a quantization_config",
            fix="Take the model's BF16 safetensors or a GGUF of it",
        )
    fields = {key: value for key, value in text.items() if key not in _NOT_THE_MODEL}
    for key in ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"):
        if key in whole:
            fields.setdefault(key, whole[key])
    fields["model_type"] = family.model_types[0]
    if fields.get("sliding_window") == 0:
        fields["sliding_window"] = None  # no window; transformers would take it for one in which nothing is seen
    if _has_own_output(source):
        fields["tie_word_embeddings"] = False
    return fields


def _has_own_output(source: ModelSource) -> bool:
    """Whether the file holds an output projection that differs from its embedding."""
    heads = [name for name in source.tensors if name.endswith("lm_head.weight")]
    embeddings = [name for name in source.tensors if name.endswith("embed_tokens.weight")]
    if not heads:
        return False
    if not embeddings or source.tensors[heads[0]].nbytes != source.tensors[embeddings[0]].nbytes:
        return True
    return not torch.equal(source.raw(heads[0]), source.raw(embeddings[0]))


def _check_rope(parameters: Any, source: ModelSource) -> None:
    """Refuse rotary types that would be computed wrongly: of the model, or of one of its layer types."""
    if not isinstance(parameters, Mapping):
        return
    for each in (parameters, *parameters.values()):
        if not isinstance(each, Mapping):
            continue
        kind = each.get("rope_type", each.get("type", "default"))
        if kind not in ROPE_TYPES:
            why = f"{source.path} asks for it; {', '.join(ROPE_TYPES)} are supported"
            raise ModelError(f"Rotary embeddings of the type {str(kind)[:40]!r} are not supported", why=why)


def _check_limits(fields: Mapping[str, Any]) -> None:
    for key, high in LIMITS.items():
        value = fields.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
            raise ModelError(f"{key} must be an integer between 1 and {high}, not {str(value)[:40]}")
