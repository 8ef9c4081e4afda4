"""Tiny random models of every family, and the same weights as GGUF files and as safetensors folders.

The GGUF writer applies llama.cpp's conversion in its own words (numpy, names from the ``gguf`` package), so that
it is an oracle for the reader: nothing here may import ``turbomoe``.

    model = tiny_model("qwen35moe")            # a transformers model, float32, seeded
    write_gguf(model, path)                    # F32; pick=... chooses a block format per tensor
    write_hub(model, folder, composite=True)   # hub names, as a vision-language checkpoint
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

Array = np.ndarray[Any, Any]
Pick = Callable[[str], GGMLQuantizationType]

VOCAB = 96
CONTEXT = 512
_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_DENSE = {"intermediate_size": 96}
_ROUTED = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_HYBRID = {
    "num_hidden_layers": 4,
    "head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 5_000.0}}
_GEMMA = {
    "head_dim": 32,
    "num_hidden_layers": 7,
    "tie_word_embeddings": True,
    "sliding_window": 8,
    "query_pre_attn_scalar": 32,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Tiny:
    """How to build a tiny member of a family and what GGUF calls its architecture."""

    model_type: str
    arch: MODEL_ARCH
    fields: dict[str, Any] = field(default_factory=dict)
    composite: str = ""  # model_type of the vision-language model around it, if there is one


TINY = {
    "llama": Tiny("llama", MODEL_ARCH.LLAMA, _DENSE | _ROPE | {"tie_word_embeddings": True}),
    "qwen2": Tiny("qwen2", MODEL_ARCH.QWEN2, _DENSE | _ROPE),
    "qwen3": Tiny("qwen3", MODEL_ARCH.QWEN3, _DENSE | _ROPE | {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma3": Tiny("gemma3_text", MODEL_ARCH.GEMMA3, _DENSE | _GEMMA, "gemma3"),
    "qwen3moe": Tiny(
        "qwen3_moe", MODEL_ARCH.QWEN3MOE, _DENSE | _ROUTED | _ROPE | {"head_dim": 32, "norm_topk_prob": True}
    ),
    "qwen35": Tiny("qwen3_5_text", MODEL_ARCH.QWEN35, _DENSE | _HYBRID | {"tie_word_embeddings": True}, "qwen3_5"),
    "qwen35moe": Tiny(
        "qwen3_5_moe_text",
        MODEL_ARCH.QWEN35MOE,
        _ROUTED | _HYBRID | {"shared_expert_intermediate_size": 64},
        "qwen3_5_moe",
    ),
}
FAMILIES = tuple(TINY)
ROUTED_FAMILIES = ("qwen3moe", "qwen35moe")


def tiny_model(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random transformers model in float32 and evaluation mode; ``changes`` override configuration fields.

    Weights are drawn much wider than at initialisation, and norms away from one, so that a wrong transform of
    any of them shows in the logits.
    """
    tiny = TINY[family]
    config = AutoConfig.for_model(tiny.model_type, **(_BASE | tiny.fields | changes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _randomise(name, parameter, generator)
    return model


def _randomise(name: str, parameter: nn.Parameter, generator: torch.Generator) -> None:
    noise = torch.randn(parameter.shape, generator=generator)
    if name.endswith("A_log"):
        parameter.copy_(torch.rand(parameter.shape, generator=generator).mul(1.5).log())
    elif parameter.dim() == 1:
        parameter.add_(noise * 0.2)
    else:
        parameter.copy_(noise * parameter.shape[-1] ** -0.5)


def tokens(length: int = 24, *, seed: int = 1, batch: int = 1) -> torch.Tensor:
    """Random token ids [batch, length], long enough to leave Gemma's window and cross DeltaNet's convolution."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a plain forward pass without a cache: [batch, length, vocab], float32."""
    return model(input_ids=ids, use_cache=False).logits.float()


# ------------------------------------------------------------------------------------------------ GGUF


def f32(name: str) -> GGMLQuantizationType:
    """Keep every tensor in float32."""
    return GGMLQuantizationType.F32


def q8_0(name: str) -> GGMLQuantizationType:
    """Matrices in Q8_0; what converters never quantise stays in float32."""
    return GGMLQuantizationType.Q8_0 if _is_quantisable(name) else GGMLQuantizationType.F32


def mixed(name: str) -> GGMLQuantizationType:
    """A mix as real files have it: embedding wide, experts narrow, down wider than gate, types differing by layer."""
    if not _is_quantisable(name):
        return GGMLQuantizationType.F32
    if "ffn_down" in name:
        return GGMLQuantizationType.Q5_1 if name.startswith(("blk.0.", "blk.2.")) else GGMLQuantizationType.Q8_0
    if "ffn_" in name:
        return GGMLQuantizationType.Q4_0 if name.startswith(("blk.0.", "blk.1.")) else GGMLQuantizationType.Q5_0
    return GGMLQuantizationType.BF16 if "attn" in name else GGMLQuantizationType.Q8_0


def _is_quantisable(name: str) -> bool:
    small = ("norm", "bias", "ssm_a", "ssm_conv1d", "ssm_alpha", "ssm_beta", "ffn_gate_inp", "rope_freqs")
    return not any(part in name.removesuffix(".weight") for part in small)


def gguf_tensors(model: PreTrainedModel, *, fused: bool = False) -> Iterator[tuple[str, Array]]:
    """(GGUF name, float32 array) of every tensor that llama.cpp's converter would write."""
    for name, tensor in _own_parameters(model):
        for target, array in to_gguf(model, name, tensor.numpy(), fused=fused):
            yield target, np.ascontiguousarray(array)
    if model.config.model_type == "llama" and model.config.rope_parameters["rope_type"] == "llama3":
        yield "rope_freqs.weight", _llama3_divisors(model)


def _own_parameters(model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


def to_gguf(model: PreTrainedModel, name: str, array: Array, *, fused: bool = False) -> list[tuple[str, Array]]:
    """What the converter writes for one transformers parameter."""
    config, arch = model.config, _arch(model)
    if name.endswith("experts.gate_up_proj"):
        layer = name.split(".")[2]
        if fused:
            return [(f"blk.{layer}.ffn_gate_up_exps.weight", array)]
        gate, up = np.split(array, 2, axis=1)
        return [(f"blk.{layer}.ffn_gate_exps.weight", gate), (f"blk.{layer}.ffn_up_exps.weight", up)]
    if name.endswith("experts.down_proj"):
        return [(f"blk.{name.split('.')[2]}.ffn_down_exps.weight", array)]
    if name.endswith("linear_attn.dt_bias"):
        return [(f"blk.{name.split('.')[2]}.ssm_dt.bias", _tile_heads(config, array, 1))]
    target = _name_map(arch, config.num_hidden_layers).get_name(name, try_suffixes=(".weight", ".bias"))
    assert target is not None, f"gguf has no name for {name}"
    return [(target, _CONVERT.get(arch, lambda config, name, array: array)(config, name, array))]


@functools.cache
def _name_map(arch: MODEL_ARCH, layers: int) -> gguf.TensorNameMap:
    return gguf.get_tensor_name_map(arch, layers)


def _arch(model: PreTrainedModel) -> MODEL_ARCH:
    return next(tiny.arch for tiny in TINY.values() if tiny.model_type == model.config.model_type)


def _convert_llama(config: Any, name: str, array: Array) -> Array:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return array
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def _convert_gemma3(config: Any, name: str, array: Array) -> Array:
    return array + np.float32(1) if name.endswith("norm.weight") else array


def _convert_qwen35(config: Any, name: str, array: Array) -> Array:
    leaf = name.split("linear_attn.")[-1]
    size = config.linear_value_head_dim
    fixed = 2 * config.linear_key_head_dim * config.linear_num_key_heads
    if name.endswith("shared_expert_gate.weight"):
        return array[0]
    if "linear_attn" not in name:
        return array + np.float32(1) if name.endswith("norm.weight") else array
    if leaf == "A_log":
        return _tile_heads(config, -np.exp(array), 1)
    if leaf in ("in_proj_a.weight", "in_proj_b.weight"):
        return _tile_heads(config, array, 1)
    if leaf == "in_proj_z.weight":
        return _tile_heads(config, array, size)
    if leaf in ("in_proj_qkv.weight", "conv1d.weight"):
        array = array[:, 0] if leaf.startswith("conv1d") else array
        return np.concatenate([array[:fixed], _tile_heads(config, array[fixed:], size)])
    return _tile_heads(config, array.T, size).T if leaf == "out_proj.weight" else array


def _tile_heads(config: Any, array: Array, size: int) -> Array:
    """Value heads from grouped by key head to tiled, on the first axis."""
    keys = config.linear_num_key_heads
    per_key = config.linear_num_value_heads // keys
    return array.reshape(keys, per_key, size, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)


_CONVERT = {
    MODEL_ARCH.LLAMA: _convert_llama,
    MODEL_ARCH.GEMMA3: _convert_gemma3,
    MODEL_ARCH.QWEN35: _convert_qwen35,
    MODEL_ARCH.QWEN35MOE: _convert_qwen35,
}


def _llama3_divisors(model: PreTrainedModel) -> Array:
    rope, size = model.config.rope_parameters, model.config.head_dim
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    return (plain / model.model.rotary_emb.inv_freq).numpy()


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    *,
    pick: Pick = f32,
    fused: bool = False,
    edit: Callable[[dict[str, Array]], None] | None = None,
    keys: Callable[[GGUFWriter], None] | None = None,
) -> Path:
    """Write ``model`` to ``path``. ``edit`` may change the dict of arrays, ``keys`` add metadata, before writing."""
    arrays = dict(gguf_tensors(model, fused=fused))
    if edit is not None:
        edit(arrays)
    writer = GGUFWriter(path, gguf.MODEL_ARCH_NAMES[_arch(model)])
    _write_metadata(writer, model)
    if keys is not None:
        keys(writer)
    for name, array in arrays.items():
        kind = pick(name)
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_metadata(writer: GGUFWriter, model: PreTrainedModel) -> None:
    config = model.config
    writer.add_name(f"tiny {config.model_type}")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    if width := getattr(config, "intermediate_size", None):
        writer.add_feed_forward_length(width)
    if config.model_type not in ("llama", "qwen2"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    _write_rope(writer, config)
    if hasattr(config, "num_experts"):
        _write_routed(writer, config)
    if hasattr(config, "linear_num_key_heads"):
        _write_deltanet(writer, config)
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)


def _write_rope(writer: GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_freq_base(rope["rope_theta"])
    if config.model_type.startswith("qwen3_5"):
        writer.add_rope_dimension_count(int(size * rope["partial_rotary_factor"]))
        writer.add_rope_dimension_sections([*rope["mrope_section"], 0])
    elif config.model_type == "llama":
        writer.add_rope_dimension_count(size)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _write_routed(writer: GGUFWriter, config: Any) -> None:
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if shared := getattr(config, "shared_expert_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(shared)


def _write_deltanet(writer: GGUFWriter, config: Any) -> None:
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
    writer.add_full_attention_interval(4)


def quantised_twin(model: PreTrainedModel, pick: Pick) -> PreTrainedModel:
    """Change ``model`` so that it holds what a file written with ``pick`` holds, by the gguf package's arithmetic.

    Every quantised tensor is a permutation (or part) of one parameter, so running the conversion on element
    numbers tells where each dequantised value belongs.
    """
    for name, parameter in _own_parameters(model):
        flat = parameter.view(-1)
        numbers = np.arange(parameter.numel()).reshape(parameter.shape)
        for target, places in _permuted(model, name, numbers):
            kind = pick(target)
            if kind == GGMLQuantizationType.F32:
                continue
            packed = gguf.quants.quantize(np.ascontiguousarray(flat.numpy()[places]), kind)
            flat[torch.from_numpy(places.reshape(-1))] = torch.from_numpy(
                gguf.quants.dequantize(packed, kind).reshape(-1)
            )
    return model


def _permuted(model: PreTrainedModel, name: str, numbers: Array) -> list[tuple[str, Array]]:
    return [(target, np.ascontiguousarray(places)) for target, places in to_gguf(model, name, numbers)]


# ------------------------------------------------------------------------------------------ safetensors


def hub_tensors(model: PreTrainedModel, *, stacked: bool = False) -> dict[str, torch.Tensor]:
    """Tensors under the names of the hub: experts one by one, or ``stacked`` as Qwen3.5 publishes them."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in _own_parameters(model):
        if ".experts." in name and not stacked:
            tensors |= _single_experts(name, tensor)
        else:
            tensors[name] = tensor
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def _single_experts(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    prefix, _, leaf = name.rpartition(".")
    if leaf == "down_proj":
        return {f"{prefix}.{expert}.down_proj.weight": part for expert, part in enumerate(tensor)}
    gate, up = tensor.chunk(2, dim=1)
    return {
        f"{prefix}.{expert}.{part}_proj.weight": matrix
        for part, stack in (("gate", gate), ("up", up))
        for expert, matrix in enumerate(stack)
    }


def write_hub(
    model: PreTrainedModel,
    folder: Path,
    *,
    stacked: bool = False,
    composite: bool = False,
    dtype: torch.dtype = torch.float32,
    edit: Callable[[dict[str, torch.Tensor]], None] | None = None,
    config: dict[str, Any] | None = None,
) -> Path:
    """Write ``model`` as a safetensors folder; ``composite`` wraps it as a vision-language model with extras.

    ``edit`` may change the tensors and ``config`` overrides fields of config.json.
    """
    tensors = {name: tensor.to(dtype) for name, tensor in hub_tensors(model, stacked=stacked).items()}
    fields = model.config.to_diff_dict()
    if composite:
        tensors = _composite_tensors(tensors)
        kind = next(tiny.composite for tiny in TINY.values() if tiny.model_type == model.config.model_type)
        tied = fields.get("tie_word_embeddings", model.config.tie_word_embeddings)
        fields = {"model_type": kind, "text_config": fields, "tie_word_embeddings": tied, "vision_config": {}}
    if edit is not None:
        edit(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields | (config or {})))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _composite_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    longer = {
        f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name: tensor
        for name, tensor in tensors.items()
    }
    return longer | {
        "model.visual.blocks.0.attn.qkv.weight": torch.zeros(4, 4),
        "mtp.layers.0.mlp.experts.0.up_proj.weight": torch.zeros(2, 3),
        "mtp.fc.weight": torch.zeros(2, 2),
    }
