"""Every family from every kind of file gives the logits of the stock model it was written from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests import tiny_models as tiny
from turbomoe.config import EngineSettings
from turbomoe.errors import ModelError
from turbomoe.models import Forecast, LoadedModel, load_model
from turbomoe.notices import board

SETTINGS = EngineSettings(dtype="float32")
Write = Callable[[PreTrainedModel, Path], Path]
FILES: dict[str, Write] = {
    "gguf": lambda model, at: tiny.write_gguf(model, at / "model.gguf"),
    "hub": lambda model, at: tiny.write_hub(model, at / "hub"),
    "stacked": lambda model, at: tiny.write_hub(model, at / "stacked", stacked=True),
    "saved": lambda model, at: save_pretrained(model, at / "saved"),
}
COMPOSITES = [family for family, kind in tiny.TINY.items() if kind.composite]


def save_pretrained(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def load(path: Path) -> LoadedModel:
    return load_model(path, SETTINGS, attention="eager")


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    assert found.shape == wanted.shape
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_equal_the_stock_model(family: str, kind: str, tmp_path: Path) -> None:
    model = tiny.tiny_model(family)
    loaded = load(FILES[kind](model, tmp_path))
    ids = tiny.tokens(batch=2)
    assert loaded.family == family
    assert relative(tiny.logits(loaded.shell, ids), tiny.logits(model, ids)) < 1e-5
    assert (loaded.experts is not None) == (family in tiny.ROUTED_FAMILIES)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_parameter_matters(family: str, tmp_path: Path) -> None:
    """The oracle above can see each weight: change any one tensor of the file and the logits change."""
    model, ids = tiny.tiny_model(family), tiny.tokens()
    wanted = tiny.logits(model, ids)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            saved = parameter.clone()
            parameter.copy_(parameter.roll(1, 0) if parameter.shape[0] > 1 else -parameter)
            assert relative(tiny.logits(model, ids), wanted) > 1e-4, name
            parameter.copy_(saved)


@pytest.mark.parametrize("pick", [tiny.q8_0, tiny.mixed])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_quantised_gguf_equals_the_dequantised_stock_model(family: str, pick: tiny.Pick, tmp_path: Path) -> None:
    model, ids = tiny.tiny_model(family), tiny.tokens()
    exact = tiny.logits(model, ids)
    loaded = load(tiny.write_gguf(model, tmp_path / "model.gguf", pick=pick))
    wanted = tiny.logits(tiny.quantised_twin(model, pick), ids)
    assert relative(tiny.logits(loaded.shell, ids), wanted) < 1e-5
    assert relative(wanted, exact) > 1e-3  # quantisation did change the model


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("family", COMPOSITES)
def test_composite_checkpoints_give_their_text_model(
    family: str, stacked: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, ids = tiny.tiny_model(family), tiny.tokens()
    before = board.counts["tensors left out"]
    loaded = load(tiny.write_hub(model, tmp_path / "whole", stacked=stacked, composite=True))
    assert relative(tiny.logits(loaded.shell, ids), tiny.logits(model, ids)) < 1e-5
    assert board.counts["tensors left out"] == before + 1


@pytest.mark.parametrize("family", tiny.ROUTED_FAMILIES)
def test_experts_are_in_the_store_and_nowhere_else(family: str, tmp_path: Path) -> None:
    model = tiny.tiny_model(family)
    path = tiny.write_gguf(model, tmp_path / "model.gguf", pick=tiny.mixed)
    loaded = load(path)
    config = model.config
    routed = sum(tensor.numel() for name, tensor in model.named_parameters() if ".experts." in name)
    dense = sum(parameter.numel() for parameter in loaded.shell.parameters())
    assert dense + routed == sum(parameter.numel() for parameter in model.parameters())
    assert loaded.weight_bytes == 4 * dense
    assert loaded.experts is not None
    store = loaded.experts.store
    assert store.layers == tuple(range(config.num_hidden_layers))
    formats = [{part.name: part.format for part in layout.parts} for layout in store.layouts]
    assert formats[0] == {"gate": "Q4_0", "up": "Q4_0", "down": "Q5_1"}
    assert formats[1] == {"gate": "Q4_0", "up": "Q4_0", "down": "Q8_0"}
    assert formats[2] == {"gate": "Q5_0", "up": "Q5_0", "down": "Q5_1"}


def test_fused_gate_and_up_of_a_gguf(tmp_path: Path) -> None:
    model, ids = tiny.tiny_model("qwen35moe"), tiny.tokens()
    loaded = load(tiny.write_gguf(model, tmp_path / "model.gguf", fused=True, pick=tiny.q8_0))
    wanted = tiny.logits(tiny.quantised_twin(model, tiny.q8_0), ids)
    assert relative(tiny.logits(loaded.shell, ids), wanted) < 1e-5


def test_multi_token_prediction_blocks_of_a_gguf_are_left_out_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, ids = tiny.tiny_model("qwen35moe"), tiny.tokens()

    def add(arrays: dict[str, tiny.Array]) -> None:
        arrays["blk.4.nextn.eh_proj.weight"] = arrays["blk.3.attn_q.weight"]
        arrays["blk.4.attn_norm.weight"] = arrays["blk.3.attn_norm.weight"]
        arrays["v.blk.0.attn_q.weight"] = arrays["blk.3.attn_norm.weight"]

    def count(writer: tiny.GGUFWriter) -> None:
        writer.kv_data[0].pop("qwen35moe.block_count")
        writer.add_block_count(5)
        writer.add_nextn_predict_layers(1)

    loaded = load(tiny.write_gguf(model, tmp_path / "model.gguf", edit=add, keys=count))
    assert relative(tiny.logits(loaded.shell, ids), tiny.logits(model, ids)) < 1e-5
    lines = [line for line in capsys.readouterr().err.splitlines() if "tensors left out" in line]
    attention_bytes = 256 * 64 * 4
    wanted = f"2 multi-token prediction tensors ({attention_bytes + 256:,} bytes) and 1 vision tensors (256 bytes)"
    assert len(lines) == 1 and wanted in lines[0]


def test_llama3_frequencies_come_from_the_file(tmp_path: Path) -> None:
    """The converter stores the long-context scaling as divisors; the hub states it in config.json."""
    model, ids = tiny.tiny_model("llama", rope_parameters=tiny.LLAMA3_ROPE), tiny.tokens(200)
    wanted = tiny.logits(model, ids)
    for kind in ("gguf", "hub"):
        assert relative(tiny.logits(load(FILES[kind](model, tmp_path)).shell, ids), wanted) < 1e-5
    plain = tiny.tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 5_000.0})
    assert relative(tiny.logits(plain, ids), wanted) > 1e-3


def scaled(kind: str) -> Callable[[tiny.GGUFWriter], None]:
    def add(writer: tiny.GGUFWriter) -> None:
        writer.add_string("llama.rope.scaling.type", kind)
        writer.add_float32("llama.rope.scaling.factor", 4.0)
        writer.add_uint32("llama.rope.scaling.original_context_length", 128)

    return add


def test_a_linear_factor_and_divisors_are_both_applied(tmp_path: Path) -> None:
    model = tiny.tiny_model("llama", rope_parameters=tiny.LLAMA3_ROPE)
    loaded = load(tiny.write_gguf(model, tmp_path / "model.gguf", keys=scaled("linear")))
    found, wanted = loaded.shell.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq / 4
    assert torch.allclose(found, wanted, rtol=1e-6, atol=0)


def test_yarn_on_top_of_divisors_is_refused(tmp_path: Path) -> None:
    model = tiny.tiny_model("llama", rope_parameters=tiny.LLAMA3_ROPE)
    with pytest.raises(ModelError, match="rope_freqs"):
        load(tiny.write_gguf(model, tmp_path / "model.gguf", keys=scaled("yarn")))


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_rope_scaling_of_a_gguf(kind: str, tmp_path: Path) -> None:
    rope = {"rope_type": kind, "rope_theta": 5_000.0, "factor": 4.0}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = 128
    model, ids = tiny.tiny_model("qwen3", rope_parameters=rope), tiny.tokens(150)
    loaded = load(tiny.write_gguf(model, tmp_path / "model.gguf"))
    assert relative(tiny.logits(loaded.shell, ids), tiny.logits(model, ids)) < 1e-5


def test_llama_with_biases(tmp_path: Path) -> None:
    model, ids = tiny.tiny_model("llama", attention_bias=True, mlp_bias=True), tiny.tokens()
    for kind in ("gguf", "hub"):
        loaded = load(FILES[kind](model, tmp_path))
        assert relative(tiny.logits(loaded.shell, ids), tiny.logits(model, ids)) < 1e-5


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_tied_and_untied_embeddings(family: str, tied: bool, tmp_path: Path) -> None:
    model, ids = tiny.tiny_model(family, tie_word_embeddings=tied), tiny.tokens()
    for kind in ("gguf", "hub"):
        shell = load(FILES[kind](model, tmp_path)).shell
        assert (shell.lm_head.weight is shell.model.embed_tokens.weight) == tied
        assert relative(tiny.logits(shell, ids), tiny.logits(model, ids)) < 1e-5


def test_a_copy_of_the_tied_embedding_is_not_kept_twice(tmp_path: Path) -> None:
    model = tiny.tiny_model("llama")

    def copy(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    shell = load(tiny.write_hub(model, tmp_path / "copy", edit=copy)).shell
    assert shell.lm_head.weight is shell.model.embed_tokens.weight


def test_an_output_projection_of_its_own_is_used_whatever_the_configuration_says(tmp_path: Path) -> None:
    model, ids = tiny.tiny_model("llama", tie_word_embeddings=False), tiny.tokens()
    path = tiny.write_hub(model, tmp_path / "own", config={"tie_word_embeddings": True})
    assert relative(tiny.logits(load(path).shell, ids), tiny.logits(model, ids)) < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_narrow_dtypes_are_the_float32_weights_rounded_once(family: str, dtype: str, tmp_path: Path) -> None:
    model = tiny.tiny_model(family)
    path = tiny.write_gguf(model, tmp_path / "model.gguf")
    loaded = load_model(path, EngineSettings(dtype=dtype), attention="eager")
    wanted = dict(load(path).shell.named_parameters())
    assert loaded.dtype == getattr(torch, dtype)
    for name, parameter in loaded.shell.named_parameters():
        assert torch.equal(parameter, wanted[name].to(loaded.dtype)), name
    frequencies = [buffer for name, buffer in loaded.shell.named_buffers() if "inv_freq" in name]
    assert frequencies and all(buffer.dtype == torch.float32 for buffer in frequencies)


def test_bfloat16_safetensors_keep_their_experts_bit_for_bit(tmp_path: Path) -> None:
    model = tiny.tiny_model("qwen3moe")
    loaded = load(tiny.write_hub(model, tmp_path / "hub", dtype=torch.bfloat16))
    assert loaded.experts is not None
    gate = loaded.experts.store.parts(1, 5)["gate"].view(torch.bfloat16).view(32, 64)
    wanted = model.model.layers[1].mlp.experts.gate_up_proj[5, :32].to(torch.bfloat16)
    assert torch.equal(gate, wanted)


def test_progress_reaches_the_total_in_steps(tmp_path: Path) -> None:
    path = tiny.write_gguf(tiny.tiny_model("qwen35moe"), tmp_path / "model.gguf")
    heard: list[tuple[int, int]] = []
    load_model(path, SETTINGS, lambda done, total: heard.append((done, total)), attention="eager")
    done = [step for step, _ in heard]
    assert done == sorted(set(done)) and len(done) > 40
    assert {total for _, total in heard} == {done[-1]}
    assert done[-1] == sum(p.numel() * 4 for p in tiny.tiny_model("qwen35moe").parameters())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_forecast_comes_before_any_reading_and_is_right(family: str, tmp_path: Path) -> None:
    path = tiny.write_gguf(tiny.tiny_model(family), tmp_path / "model.gguf", pick=tiny.q8_0)
    order: list[Any] = []
    loaded = load_model(
        path, SETTINGS, lambda done, total: order.append("read"), attention="eager", before=order.append
    )
    forecast = order[0]
    assert order[1:] and set(order[1:]) == {"read"}
    assert forecast.weight_bytes == loaded.weight_bytes
    assert forecast.layers == loaded.layers
    packed = 0 if loaded.experts is None else loaded.experts.store.nbytes
    assert forecast.expert_bytes == packed  # these sizes need no padding
    with pytest.raises(KeyboardInterrupt):
        load_model(path, SETTINGS, lambda done, total: pytest.fail("read"), attention="eager", before=_stop)


def _stop(forecast: Forecast) -> None:
    raise KeyboardInterrupt


def test_facts_beside_the_weights(tmp_path: Path) -> None:
    model = tiny.tiny_model("gemma3")

    def sampling(writer: tiny.GGUFWriter) -> None:
        writer.add_sampling_temp(0.6)
        writer.add_sampling_top_k(20)
        writer.add_sampling_min_p(0.25)

    loaded = load(tiny.write_gguf(model, tmp_path / "model.gguf", keys=sampling))
    assert loaded.sampling == {"temperature": 0.6, "top_k": 20, "min_p": 0.25}
    assert (loaded.name, loaded.context_length, loaded.tokenizer) == ("model", tiny.CONTEXT, None)
    assert [layer.window for layer in loaded.layers] == [8, 8, 8, 8, 8, 0, 8]
    hub = tiny.write_hub(model, tmp_path / "tiny-1.7B")
    (hub / "generation_config.json").write_text(json.dumps({"temperature": 1.0, "top_p": 0.95, "top_k": None}))
    loaded = load(hub)
    assert loaded.sampling == {"temperature": 1.0, "top_p": 0.95}
    assert loaded.name == "tiny-1.7B"


def test_the_same_file_has_the_same_identity(tmp_path: Path) -> None:
    path = tiny.write_gguf(tiny.tiny_model("llama"), tmp_path / "a.gguf")
    other = tiny.write_gguf(tiny.tiny_model("llama", num_hidden_layers=2), tmp_path / "b.gguf")
    assert load(path).identity == load(path).identity != load(other).identity


def test_gemma_windows_layer_by_layer(tmp_path: Path) -> None:
    """Newer files say for each layer whether it slides."""
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    model = tiny.tiny_model("gemma3", num_hidden_layers=3, layer_types=kinds)
    ids = tiny.tokens()

    def pattern(writer: tiny.GGUFWriter) -> None:
        writer.add_sliding_window_pattern([False, True, False])

    loaded = load(tiny.write_gguf(model, tmp_path / "model.gguf", keys=pattern))
    assert relative(tiny.logits(loaded.shell, ids), tiny.logits(model, ids)) < 1e-5
