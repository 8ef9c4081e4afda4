"""What a model family has to say: its names in GGUF and on the hub, its configuration, its tensor table.

``decoder_config`` and the tables below hold what nearly all families share; a family's file holds the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from turbomoe.errors import ModelError
from turbomoe.models.header import MAX_CONTEXT, MAX_EXPERTS, MAX_HEADS, MAX_LAYERS, GgufHeader
from turbomoe.models.placement import Dense, Routed

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Table = dict[str, Dense | Routed]


@dataclass(frozen=True)
class Family:
    """One family of models.

    ``architecture`` is GGUF's ``general.architecture``; ``model_types`` the values of ``model_type`` in a
    config.json, the text model's own first (it names the shell's class), then composites that contain it.
    ``config`` turns GGUF metadata into the fields of that configuration. ``layer`` maps what follows
    ``blk.N.`` in a GGUF name to its place in decoder layer N, ``model`` the names outside the layers.
    """

    name: str
    architecture: str
    model_types: tuple[str, ...]
    config: Callable[[GgufHeader], dict[str, Any]]
    layer: Callable[[PretrainedConfig], Mapping[str, Dense | Routed]]
    model: Callable[[PretrainedConfig], Mapping[str, Dense]]


EMBEDDINGS = {
    "token_embd.weight": Dense("model.embed_tokens.weight"),
    "output.weight": Dense("lm_head.weight"),
}
OUTER: dict[str, Dense] = EMBEDDINGS | {"output_norm.weight": Dense("model.norm.weight")}
ATTENTION: Table = {
    "attn_q.weight": Dense("self_attn.q_proj.weight"),
    "attn_k.weight": Dense("self_attn.k_proj.weight"),
    "attn_v.weight": Dense("self_attn.v_proj.weight"),
    "attn_output.weight": Dense("self_attn.o_proj.weight"),
}
QKV_BIAS: Table = {
    "attn_q.bias": Dense("self_attn.q_proj.bias"),
    "attn_k.bias": Dense("self_attn.k_proj.bias"),
    "attn_v.bias": Dense("self_attn.v_proj.bias"),
}
QK_NORM: Table = {
    "attn_q_norm.weight": Dense("self_attn.q_norm.weight"),
    "attn_k_norm.weight": Dense("self_attn.k_norm.weight"),
}
NORMS: Table = {
    "attn_norm.weight": Dense("input_layernorm.weight"),
    "ffn_norm.weight": Dense("post_attention_layernorm.weight"),
}
MLP: Table = {
    "ffn_gate.weight": Dense("mlp.gate_proj.weight"),
    "ffn_up.weight": Dense("mlp.up_proj.weight"),
    "ffn_down.weight": Dense("mlp.down_proj.weight"),
}
ROUTED: Table = {
    "ffn_gate_inp.weight": Dense("mlp.gate.weight"),
    "ffn_gate_exps.weight": Routed(("gate",)),
    "ffn_up_exps.weight": Routed(("up",)),
    "ffn_gate_up_exps.weight": Routed(("gate", "up")),
    "ffn_down_exps.weight": Routed(("down",)),
}


def outer(config: PretrainedConfig) -> Mapping[str, Dense]:
    """The tensors outside the layers where nothing is special about them."""
    return OUTER


def decoder_config(header: GgufHeader, model_type: str) -> dict[str, Any]:
    """Configuration fields that all these families share, from GGUF metadata."""
    return {
        "model_type": model_type,
        "vocab_size": header.vocab_size,
        "hidden_size": header.integer("embedding_length"),
        "num_hidden_layers": decoder_layers(header),
        "num_attention_heads": header.integer("attention.head_count", high=MAX_HEADS),
        "num_key_value_heads": kv_heads(header),
        "head_dim": head_dim(header),
        "max_position_embeddings": header.integer("context_length", high=MAX_CONTEXT),
        "rms_norm_eps": header.number("attention.layer_norm_rms_epsilon"),
        # The converter leaves the output projection out when it is the embedding matrix.
        "tie_word_embeddings": not header.has_tensor("output.weight"),
        "bos_token_id": header.token_id("bos"),
        "eos_token_id": header.token_id("eos"),
        "pad_token_id": header.token_id("padding"),
    }


def decoder_layers(header: GgufHeader) -> int:
    """Decoder layers; GGUF counts multi-token-prediction blocks among its blocks, at the end."""
    blocks = header.integer("block_count", high=MAX_LAYERS)
    extra = header.integer("nextn_predict_layers", low=0, high=blocks, default=0)
    if extra == blocks:
        raise header.wrong("nextn_predict_layers", "it leaves no decoder layer")
    # Checked here because building a model of a thousand layers, only to find them missing, takes seconds.
    if not any(name.startswith(f"blk.{blocks - 1}.") for name in header.source.tensors):
        raise header.wrong("block_count", f"the file has no block {blocks - 1}")
    return blocks - extra


def kv_heads(header: GgufHeader) -> int:
    heads = header.integer("attention.head_count", high=MAX_HEADS)
    found = header.integer("attention.head_count_kv", high=MAX_HEADS, default=heads)
    if heads % found:
        raise header.wrong("attention.head_count_kv", f"{heads} query heads cannot share {found} key-value heads")
    return found


def head_dim(header: GgufHeader) -> int:
    """Values per head: stated, or the hidden size shared among the heads. Keys and values must agree."""
    hidden, heads = header.integer("embedding_length"), header.integer("attention.head_count", high=MAX_HEADS)
    if not header.has("attention.key_length") and hidden % heads:
        raise header.wrong("attention.head_count", f"it must divide the hidden size {hidden}, not be {heads}")
    size = header.integer("attention.key_length", default=hidden // heads)
    if size % 2 or header.integer("attention.value_length", default=size) != size:
        raise header.wrong("attention.key_length", "it must be even and equal to the value length")
    return size


def rope_parameters(header: GgufHeader, *, default_base: float = 10_000.0) -> dict[str, Any]:
    """Rotary parameters of a model that rotates whole heads, with linear or YaRN scaling if the file says so."""
    size = head_dim(header)
    if header.integer("rope.dimension_count", default=size) != size:
        raise header.wrong("rope.dimension_count", f"a {header.architecture} model rotates its whole head of {size}")
    base = {"rope_theta": header.number("rope.freq_base", default=default_base)}
    return base | _rope_scaling(header)


_NEUTRAL_SCALING = ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_ext_factor")


def _rope_scaling(header: GgufHeader) -> dict[str, Any]:
    kind = header.text("rope.scaling.type", "none")
    if kind == "none":
        return {"rope_type": "default"}
    if kind not in ("linear", "yarn"):
        raise header.wrong("rope.scaling.type", f"the scaling {kind!r} is not supported; none, linear and yarn are")
    for key in _NEUTRAL_SCALING:
        if header.number(key, default=1.0) != 1.0:
            raise header.wrong(key, "values other than 1 are not supported")
    refuse(header, "rope.scaling.yarn_log_multiplier", "A YaRN log multiplier")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": header.number("rope.scaling.factor")}
    return scaling | _yarn(header) if kind == "yarn" else scaling


def _yarn(header: GgufHeader) -> dict[str, Any]:
    original = header.integer("rope.scaling.original_context_length", high=MAX_CONTEXT)
    betas = {name: f"rope.scaling.yarn_{name}" for name in ("beta_fast", "beta_slow")}
    given = {name: header.number(key) for name, key in betas.items() if header.has(key)}
    return {"original_max_position_embeddings": original} | given


def routed_config(header: GgufHeader) -> dict[str, Any]:
    """Configuration fields of routed experts."""
    experts = header.integer("expert_count", high=MAX_EXPERTS)
    return {
        "num_experts": experts,
        "num_experts_per_tok": header.integer("expert_used_count", high=experts),
        "moe_intermediate_size": header.integer("expert_feed_forward_length"),
    }


def refuse(header: GgufHeader, key: str, what: str) -> None:
    """Raise ``ModelError`` if ``key`` is present and not zero: computing on would be silently wrong."""
    if header.source.metadata.get(f"{header.architecture}.{key}"):
        raise ModelError(f"{what} is not supported for {header.architecture} models", why=f"File {header.source.path}")
