"""Contract with transformers: configurations, shells on the meta device, expert swap. Oldest and newest release."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests import tiny_models as tiny
from turbomoe.config import EngineSettings
from turbomoe.errors import ModelError, TurbomoeError
from turbomoe.models import load_model
from turbomoe.upstream import shell as seam
from turbomoe.upstream.versions import check_transformers

FLOAT32 = torch.float32


def fields(family: str) -> dict[str, Any]:
    kind = tiny.TINY[family]
    return {"model_type": kind.model_type} | tiny._BASE | kind.fields


def build(family: str, dtype: torch.dtype = FLOAT32) -> nn.Module:
    return seam.build_shell(seam.make_config(fields(family)), attention="eager", dtype=dtype)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_shell_has_no_weights_and_the_stock_buffers(family: str) -> None:
    shell, stock = build(family), tiny.tiny_model(family)
    assert all(parameter.is_meta and not parameter.requires_grad for parameter in shell.parameters())
    assert not shell.training
    wanted = dict(stock.named_buffers())
    assert wanted and dict(shell.named_buffers()).keys() == wanted.keys()
    for name, buffer in shell.named_buffers():
        assert torch.equal(buffer, wanted[name]), name
    assert [name for name, _ in shell.named_parameters()] == [name for name, _ in stock.named_parameters()]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_bfloat16_shell_keeps_the_buffers_of_a_bfloat16_model(family: str) -> None:
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_config(seam.make_config(fields(family)), dtype=torch.bfloat16)
    wanted = dict(stock.named_buffers())
    for name, buffer in build(family, torch.bfloat16).named_buffers():
        assert buffer.dtype == wanted[name].dtype and torch.equal(buffer, wanted[name]), name


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_expert_swap_finds_routed_experts_and_nothing_else(family: str) -> None:
    shell = build(family)
    made = seam.swap_experts(shell, lambda layer: nn.Identity())
    if family not in tiny.ROUTED_FAMILIES:
        assert made == {}
        return
    layers = shell.model.layers  # type: ignore[union-attr]
    assert sorted(made) == list(range(len(layers)))  # type: ignore[arg-type]
    assert all(layers[layer].mlp.experts is module for layer, module in made.items())  # type: ignore[index]
    assert not any(".experts." in name for name, _ in shell.named_parameters())


@pytest.mark.parametrize("family", tiny.ROUTED_FAMILIES)
def test_experts_are_called_with_final_weights(family: str, tmp_path: Path) -> None:
    """What the store computes is the whole routed sum: ids int64 [T, K], weights [T, K] already normalised."""
    calls: list[tuple[torch.Tensor, ...]] = []

    class Spy(nn.Module):
        def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
            calls.append(arguments)
            return torch.zeros_like(arguments[0])

    model = tiny.tiny_model(family)
    seam.swap_experts(model, lambda layer: Spy())
    tiny.logits(model, tiny.tokens(6, batch=2))
    assert len(calls) == model.config.num_hidden_layers
    for hidden, ids, weights in calls:
        assert (hidden.shape, ids.shape, weights.shape) == ((12, 64), (12, 2), (12, 2))
        assert ids.dtype == torch.int64 and weights.dtype == FLOAT32
        assert torch.allclose(weights.sum(-1), torch.ones(12))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_loaded_models_equal_stock_ones(family: str, tmp_path: Path) -> None:
    """The one end-to-end check that runs on every supported release."""
    model, ids = tiny.tiny_model(family), tiny.tokens()
    wanted = tiny.logits(model, ids)
    for path in (tiny.write_gguf(model, tmp_path / "m.gguf"), tiny.write_hub(model, tmp_path / "hub")):
        found = tiny.logits(load_model(path, EngineSettings(dtype="float32"), attention="eager").shell, ids)
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("family", ["qwen35", "qwen35moe"])
def test_our_gguf_files_are_those_that_transformers_reads(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own GGUF loader (from 5.18 on) is an oracle for the writer of these tests, and so for our reader."""
    from transformers import AutoModelForCausalLM, __version__

    if tuple(int(part) for part in __version__.split(".")[:2]) < (5, 18):
        pytest.skip("this release cannot read GGUF files of Qwen3.5")

    def vocabulary(writer: tiny.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([f"t{index}" for index in range(tiny.VOCAB)])

    # It asks for accelerate before reading any GGUF, and does not use it without a device map.
    monkeypatch.setattr("transformers.modeling_utils.is_accelerate_available", lambda *_: True)
    model, ids = tiny.tiny_model(family), tiny.tokens()
    tiny.write_gguf(model, tmp_path / "m.gguf", keys=vocabulary)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=FLOAT32).eval()
    wanted = tiny.logits(theirs, ids)
    assert (tiny.logits(model, ids) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_tying_uses_one_tensor() -> None:
    shell = build("llama")
    shell.model.embed_tokens.weight = nn.Parameter(torch.zeros(tiny.VOCAB, 64))  # type: ignore[union-attr]
    assert seam.on_meta(shell)
    seam.tie_embeddings(shell)
    assert shell.lm_head.weight is shell.model.embed_tokens.weight  # type: ignore[union-attr]
    assert "lm_head.weight" not in seam.on_meta(shell)


def test_a_buffer_that_nobody_fills_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaPreTrainedModel

    monkeypatch.setattr(LlamaPreTrainedModel, "_init_weights", lambda self, module: None)
    with pytest.raises(ModelError, match="inv_freq without a value"):
        build("llama")


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "no such function"},
        {"num_attention_heads": 5},
        {"rms_norm_eps": "small"},
        {"rope_parameters": {"rope_type": "unheard of"}},
        {"num_hidden_layers": "three"},
    ],
)
def test_nonsense_is_refused_in_one_line(change: dict[str, Any]) -> None:
    with pytest.raises(ModelError) as caught:
        seam.build_shell(seam.make_config(fields("llama") | change), attention="eager", dtype=FLOAT32)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_json_round_trip_changes_nothing() -> None:
    config = seam.make_config(json.loads(json.dumps(fields("qwen35moe"))))
    assert config.to_dict() == tiny.tiny_model("qwen35moe").config.to_dict() | {"dtype": None}


@pytest.mark.parametrize("version", ["5.17.0", "5.24.0", "5.99.1", "5.17.0.dev0", "5.30rc1"])
def test_supported_releases(version: str) -> None:
    check_transformers(version)


@pytest.mark.parametrize("version", ["4.57.0", "5.16.9", "6.0.0", "garbage", "5"])
def test_other_releases_are_refused_with_the_range(version: str) -> None:
    with pytest.raises(TurbomoeError, match=r">=5\.17,<6"):
        check_transformers(version)
