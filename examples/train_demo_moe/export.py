"""Turn a trained folder into a GGUF file (architecture qwen35moe, or qwen35 for the dense sister).

    python export.py out tokenizer.json demo-moe.gguf

Also puts the tokenizer into the folder, so that transformers and turbomoe load that too. The FFN's matrices become
Q4_0, to which training rounded them; other matrices Q8_0; the router and everything small stay in float32.
The transforms are llama.cpp's: norms as 1 + w, decays as -exp(w), value heads tiled instead of grouped by key head.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter, TokenType
from safetensors.numpy import load_file
from tokenizer import END

Array = npt.NDArray[np.float32]
Transform = Callable[[dict[str, Any], Array], Array]

NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "linear_attn.in_proj_qkv.weight": "attn_qkv.weight",
    "linear_attn.in_proj_z.weight": "attn_gate.weight",
    "linear_attn.in_proj_a.weight": "ssm_alpha.weight",
    "linear_attn.in_proj_b.weight": "ssm_beta.weight",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.out_proj.weight": "ssm_out.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
    "mlp.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
NARROW = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate.", "ffn_up.", "ffn_down.")
EXACT = ("norm", "ssm_a", "ssm_conv1d", "ssm_beta", "ssm_dt", "ffn_gate_inp")


def pick(name: str) -> Kind:
    """The type in which a tensor is stored."""
    if any(part in name for part in EXACT):
        return Kind.F32
    return Kind.Q4_0 if any(part in name for part in NARROW) else Kind.Q8_0


def load(folder: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """(configuration, weights by transformers' name, float32)."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    weights: dict[str, Array] = {}
    for path in sorted(folder.glob("model-*.safetensors")):
        weights |= {name: array.astype(np.float32) for name, array in load_file(path).items()}
    return config, weights


def convert(config: dict[str, Any], name: str, array: Array) -> list[tuple[str, Array]]:
    """GGUF names and contents for one weight."""
    if name == "model.embed_tokens.weight":
        return [("token_embd.weight", array)]
    if name == "model.norm.weight":
        return [("output_norm.weight", array + 1)]
    _, _, layer, leaf = name.split(".", 3)
    if leaf == "mlp.experts.gate_up_proj":
        gate, up = np.split(array, 2, axis=1)
        return [(f"blk.{layer}.ffn_gate_exps.weight", gate), (f"blk.{layer}.ffn_up_exps.weight", up)]
    transform = TRANSFORMS.get(leaf)
    return [(f"blk.{layer}.{NAMES[leaf]}", array if transform is None else transform(config, array))]


def _shifted(config: dict[str, Any], array: Array) -> Array:
    return array + 1


def _tiled(config: dict[str, Any], array: Array) -> Array:
    """Value heads on the first axis, in an order that counts key heads fastest."""
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    heads = array.reshape(keys, values // keys, array.shape[0] // values, *array.shape[1:])
    return heads.swapaxes(0, 1).reshape(array.shape)


def _tiled_tail(config: dict[str, Any], array: Array) -> Array:
    """Queries and keys first, as they are; then the value heads."""
    fixed = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"]
    return np.concatenate([array[:fixed], _tiled(config, array[fixed:])])


TRANSFORMS: dict[str, Transform] = {
    "input_layernorm.weight": _shifted,
    "post_attention_layernorm.weight": _shifted,
    "self_attn.q_norm.weight": _shifted,
    "self_attn.k_norm.weight": _shifted,
    "linear_attn.in_proj_qkv.weight": _tiled_tail,
    "linear_attn.conv1d.weight": lambda config, array: _tiled_tail(config, array[:, 0]),
    "linear_attn.in_proj_z.weight": _tiled,
    "linear_attn.in_proj_a.weight": _tiled,
    "linear_attn.in_proj_b.weight": _tiled,
    "linear_attn.dt_bias": _tiled,
    "linear_attn.A_log": lambda config, array: _tiled(config, -np.exp(array)),
    "linear_attn.out_proj.weight": lambda config, array: _tiled(config, array.T).T,
    "mlp.shared_expert_gate.weight": lambda config, array: array[0],
}


def write_sizes(writer: GGUFWriter, config: dict[str, Any]) -> None:
    """The keys that describe the architecture."""
    rope = config["rope_parameters"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(config["head_dim"] * rope["partial_rotary_factor"]))
    writer.add_rope_dimension_sections([*rope["mrope_section"], 0])
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(config["linear_num_value_heads"])
    writer.add_ssm_inner_size(config["linear_value_head_dim"] * config["linear_num_value_heads"])
    writer.add_full_attention_interval(4)
    if "num_experts" in config:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    else:
        writer.add_feed_forward_length(config["intermediate_size"])


def write_tokenizer(writer: GGUFWriter, tokenizer: dict[str, Any], size: int) -> None:
    """Vocabulary and merges of a ``tokenizer.json``; numbers that no token has are marked as unused."""
    names = {number: token for token, number in tokenizer["model"]["vocab"].items()}
    merges = tokenizer["model"]["merges"]
    kinds = [TokenType.NORMAL if number in names else TokenType.UNUSED for number in range(size)]
    end = tokenizer["model"]["vocab"][END]
    kinds[end] = TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([names.get(number, f"[unused{number}]") for number in range(size)])
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_eos_token_id(end)
    writer.add_pad_token_id(end)
    writer.add_add_bos_token(False)


def export(folder: Path, tokenizer: Path, path: Path, choose: Callable[[str], Kind] = pick) -> None:
    """Write the GGUF file."""
    config, weights = load(folder)
    routed = "num_experts" in config
    writer = GGUFWriter(path, "qwen35moe" if routed else "qwen35")
    writer.add_name("turbomoe demo MoE" if routed else "turbomoe demo dense")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    write_sizes(writer, config)
    write_tokenizer(writer, json.loads(tokenizer.read_text("utf-8")), config["vocab_size"])
    for name, array in weights.items():
        for target, values in convert(config, name, array):
            kind = choose(target)
            packed = gguf.quants.quantize(np.ascontiguousarray(values), kind)
            writer.add_tensor(target, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def complete_folder(folder: Path, tokenizer: Path) -> None:
    """Put the tokenizer and the index of the weights beside them, as transformers wants it."""
    shards = sorted(folder.glob("model-*.safetensors"))
    index = {name: path.name for path in shards for name in load_file(path)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "tokenizer.json").write_text(tokenizer.read_text("utf-8"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields, indent=1) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    complete_folder(options.folder, options.tokenizer)
    export(options.folder, options.tokenizer, options.output)
    print(f"{options.output}: {options.output.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
