"""Files that are readable but not a model that fits: one error type, which names what is wrong."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny_models as tiny
from tests.models.altered import Altered
from turbomoe.config import EngineSettings
from turbomoe.errors import ModelError, SettingsError, TurbomoeError
from turbomoe.files import open_model
from turbomoe.files.base import ModelSource, TensorInfo
from turbomoe.models import load_model, usable_device
from turbomoe.models.configure import read_config
from turbomoe.models.families import FAMILIES, find_family
from turbomoe.models.names import names_of
from turbomoe.models.plan import make_plan
from turbomoe.models.shapes import expert_shape, layer_shapes
from turbomoe.upstream.shell import build_shell, swap_experts

SETTINGS = EngineSettings(dtype="float32")
Edit = Callable[[dict[str, Any]], None]


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(path, SETTINGS, attention="eager")
    return str(caught.value)


def write(family: str, kind: str, at: Path, edit: Edit) -> Path:
    model = tiny.tiny_model(family)
    if kind == "gguf":
        return tiny.write_gguf(model, at / "model.gguf", edit=edit)
    return tiny.write_hub(model, at / "hub", edit=edit)


def names(family: str, kind: str) -> list[str]:
    """Tensors one could damage: a block matrix, a norm, the embedding, and an expert if there is one."""
    model = tiny.tiny_model(family)
    known = dict(tiny.gguf_tensors(model)) if kind == "gguf" else tiny.hub_tensors(model)
    wanted = ["token_embd.weight", "output_norm.weight"] if kind == "gguf" else ["model.norm.weight"]
    return wanted + [name for name in known if name.startswith(("blk.1.", "model.layers.1."))]


# The hub's names need no family's table, so two families stand for all.
CASES = [(family, "gguf", name) for family in tiny.FAMILIES for name in names(family, "gguf")]
CASES += [(family, "hub", name) for family in ("llama", "qwen35moe") for name in names(family, "hub")]


@functools.cache
def pristine(family: str, kind: str) -> ModelSource:
    """A well-formed model's metadata and tensor table, detached from its file."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        source = open_model(write(family, kind, Path(folder), lambda tensors: None))
        metadata = {key: source.metadata[key] for key in source.metadata}
        return Altered(kind if kind == "gguf" else "safetensors", metadata, dict(source.tensors), f"{family}.{kind}")


Built = tuple[Any, torch.nn.Module, dict[int, torch.nn.Module]]


def build(source: ModelSource) -> Built:
    """All that comes before the tensors."""
    config = read_config(source, find_family(source))
    layer_shapes(config)
    shell = build_shell(config, attention="eager", dtype=torch.float32)
    return config, shell, swap_experts(shell, lambda layer: torch.nn.Identity())


@functools.cache
def built(family: str, kind: str) -> Built:
    return build(pristine(family, kind))


def plan(source: ModelSource, given: Built | None = None) -> None:
    """All that comes before reading weights."""
    config, shell, routed = given or build(source)
    names = names_of(source, find_family(source), config)
    make_plan(source, names, shell, routed, expert_shape(config) if routed else None)


def altered(family: str, kind: str, tensors: dict[str, TensorInfo]) -> Altered:
    whole = pristine(family, kind)
    return Altered(whole.kind, whole.metadata, tensors, str(whole.path))


@pytest.mark.parametrize(("family", "kind", "name"), CASES)
def test_missing_extra_and_misshapen_tensors_are_named(family: str, kind: str, name: str) -> None:
    tensors, given = dict(pristine(family, kind).tensors), built(family, kind)
    plan(altered(family, kind, tensors), given)
    lacking = {key: info for key, info in tensors.items() if key != name}
    with pytest.raises(ModelError, match="lacks weights") as caught:
        plan(altered(family, kind, lacking), given)
    assert name in str(caught.value)
    extra = name.replace("weight", "weight2") if "weight" in name else name + "2"
    with pytest.raises(ModelError, match="has no place") as caught:
        plan(altered(family, kind, tensors | {extra: TensorInfo(extra, (64,), "F32", 256)}), given)
    assert extra in str(caught.value)
    info = tensors[name]
    for shape in ((*info.shape[:-1], info.shape[-1] + 32), (*info.shape, 2), info.shape[:-1] or (1,), (1, 1, 1, 1)):
        with pytest.raises(ModelError) as caught:
            plan(altered(family, kind, tensors | {name: TensorInfo(name, shape, "F32", 4)}), given)
        assert name in str(caught.value) and str(shape) in str(caught.value)


@pytest.mark.parametrize("kind", ["gguf", "hub"])
def test_the_loader_itself_refuses_before_it_reads(kind: str, tmp_path: Path) -> None:
    lost = "blk.1.attn_k.weight" if kind == "gguf" else "model.layers.1.self_attn.k_proj.weight"
    text = refusal(write("llama", kind, tmp_path, lambda tensors: tensors.pop(lost)))
    assert "model.layers.1.self_attn.k_proj.weight" in text and "lacks" in text
    if kind == "gguf":
        assert lost in text


def test_all_missing_weights_are_counted(tmp_path: Path) -> None:
    def drop(tensors: dict[str, Any]) -> None:
        for leaf in ("gate", "up", "down"):
            del tensors[f"blk.1.ffn_{leaf}_exps.weight"]

    text = refusal(write("qwen3moe", "gguf", tmp_path, drop))
    assert "blk.1.ffn_gate_exps.weight (model.layers.1.mlp.experts.0.gate_proj.weight in the model) and 23 more" in text


def test_one_expert_missing_on_the_hub(tmp_path: Path) -> None:
    lost = "model.layers.2.mlp.experts.7.up_proj.weight"
    assert lost in refusal(write("qwen35moe", "hub", tmp_path, lambda tensors: tensors.pop(lost)))


@pytest.mark.parametrize("name", ["experts.8.up_proj.weight", "experts.0.side_proj.weight", "experts.x"])
def test_an_expert_too_many_on_the_hub(name: str, tmp_path: Path) -> None:
    full = f"model.layers.2.mlp.{name}"

    def add(tensors: dict[str, Any]) -> None:
        tensors[full] = torch.zeros(32, 64)

    text = refusal(write("qwen3moe", "hub", tmp_path, add))
    assert full in text and "has no place" in text


def test_experts_given_twice(tmp_path: Path) -> None:
    def add(tensors: dict[str, Any]) -> None:
        tensors["model.layers.0.mlp.experts.down_proj"] = torch.zeros(8, 64, 32)

    assert "more than once" in refusal(write("qwen3moe", "hub", tmp_path, add))


def test_a_weight_given_twice_under_two_names(tmp_path: Path) -> None:
    def add(tensors: dict[str, Any]) -> None:
        tensors["model.language_model.norm.weight"] = tensors["model.norm.weight"].clone()

    assert "model.norm.weight more than once" in refusal(write("llama", "hub", tmp_path, add))


def test_experts_of_one_layer_in_two_formats() -> None:
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    tensors = dict(pristine("qwen3moe", "hub").tensors)
    tensors[name] = TensorInfo(name, (32, 64), "BF16", 32 * 64 * 2)
    with pytest.raises(ModelError, match="unlike its layer's other experts") as caught:
        plan(altered("qwen3moe", "hub", tensors))
    assert name in str(caught.value)


def test_a_block_beyond_the_last_is_not_taken_for_prediction(tmp_path: Path) -> None:
    def add(tensors: dict[str, Any]) -> None:
        tensors["blk.3.attn_norm.weight"] = tensors["blk.2.attn_norm.weight"]

    assert "blk.3.attn_norm.weight" in refusal(write("llama", "gguf", tmp_path, add))


def test_attention_weights_in_a_deltanet_layer(tmp_path: Path) -> None:
    def add(tensors: dict[str, Any]) -> None:
        tensors["blk.0.attn_q.weight"] = tensors["blk.3.attn_q.weight"]

    assert "blk.0.attn_q.weight" in refusal(write("qwen35", "gguf", tmp_path, add))


def test_a_buffer_cannot_be_smuggled_in_from_the_hub(tmp_path: Path) -> None:
    def add(tensors: dict[str, Any]) -> None:
        tensors["model.embed_tokens.embed_scale"] = torch.zeros(())

    assert "embed_scale" in refusal(write("gemma3", "hub", tmp_path, add))


def test_rotary_frequencies_of_old_checkpoints_are_left_out(tmp_path: Path) -> None:
    def add(tensors: dict[str, Any]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)

    loaded = load_model(write("llama", "hub", tmp_path, add), SETTINGS, attention="eager")
    assert loaded.shell.model.rotary_emb.inv_freq[0] == 1.0


# ------------------------------------------------------------------------- architecture and configuration


@pytest.mark.parametrize("architecture", ["mamba", "", "llama4", None, 7])
def test_unknown_architecture_lists_the_supported(architecture: Any) -> None:
    whole = pristine("llama", "gguf")
    source = Altered("gguf", dict(whole.metadata) | {"general.architecture": architecture}, whole.tensors)
    with pytest.raises(ModelError) as caught:
        find_family(source)
    text = str(caught.value)
    assert all(family.architecture in text for family in FAMILIES)
    assert str(architecture) in text if architecture else "does not say" in text


@pytest.mark.parametrize("kind", ["mixtral", None, ["llama"], {"a": 1}])
def test_unknown_model_type_lists_the_supported(kind: Any, tmp_path: Path) -> None:
    path = tiny.write_hub(tiny.tiny_model("llama"), tmp_path / "hub", config={"model_type": kind})
    assert "qwen3_5_moe" in refusal(path)


def test_quantised_safetensors_are_refused_with_a_way_on(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "fp8"}}
    text = refusal(tiny.write_hub(tiny.tiny_model("llama"), tmp_path / "hub", config=config))
    assert "quantization_config" in text and "GGUF" in text


def test_mixtral_under_the_name_of_llama_is_refused(tmp_path: Path) -> None:
    path = tiny.write_gguf(tiny.tiny_model("llama"), tmp_path / "m.gguf", keys=lambda to: to.add_expert_count(8))
    assert "Mixtral" in refusal(path)


@pytest.mark.parametrize("key", ["use_bidirectional_attention", "attn_logit_softcapping"])
def test_attention_that_we_do_not_compute_is_refused(key: str, tmp_path: Path) -> None:
    value: Any = True if key.startswith("use") else 30.0
    path = tiny.write_hub(tiny.tiny_model("gemma3"), tmp_path / "hub", config={key: value})
    assert key in refusal(path)


def written_keys(family: str) -> list[str]:
    prefix = f"{find_family(pristine(family, 'gguf')).architecture}."
    return [key for key in pristine(family, "gguf").metadata if key.startswith(prefix)]


# Keys that a file may leave out, and what is then taken: llama.cpp's defaults.
DEFAULTS: dict[str, dict[str, Any]] = {
    "attention.value_length": {},
    "attention.head_count_kv": {"num_key_value_heads": 4},
    "full_attention_interval": {"layer_types": ["linear_attention"] * 3 + ["full_attention"]},
    "llama.rope.freq_base": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
    "qwen2.rope.freq_base": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
    "qwen3.rope.freq_base": {"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}},
    "qwen3moe.rope.freq_base": {"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}},
    "llama.rope.dimension_count": {"head_dim": 16},
    "qwen3moe.feed_forward_length": {"intermediate_size": 32},
    "gemma3.rope.scaling.type": {},
    "gemma3.rope.freq_base": {},
}


@pytest.mark.parametrize(("family", "key"), [(family, key) for family in tiny.FAMILIES for key in written_keys(family)])
def test_missing_metadata_is_named_or_has_a_known_default(family: str, key: str) -> None:
    whole = pristine(family, "gguf")
    source = Altered("gguf", {k: v for k, v in whole.metadata.items() if k != key}, whole.tensors)
    defaults = DEFAULTS.get(key, DEFAULTS.get(key.partition(".")[2]))
    if defaults is None:
        with pytest.raises(ModelError) as caught:
            read_config(source, find_family(source))
        assert key in str(caught.value)
        return
    config = read_config(source, find_family(source))
    assert {field: getattr(config, field) for field in defaults} == defaults


WEIRD = st.one_of(
    st.sampled_from([0, -1, 1, 2, 3, 5, 7, 63, 65, 1023, 1 << 20, 1 << 31, 1 << 63, True, None]),
    st.sampled_from(["", "4", b"4", [], [4], {}]),
    st.integers(-(1 << 64), 1 << 64),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-3, 300), max_size=4),
)


@settings(max_examples=300)
@given(data=st.data())
def test_wrong_metadata_never_ends_in_another_error(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(tiny.FAMILIES))
    whole = pristine(family, "gguf")
    metadata = dict(whole.metadata)
    for key in data.draw(st.lists(st.sampled_from(written_keys(family)), min_size=1, max_size=2, unique=True)):
        metadata[key] = data.draw(WEIRD)
    survives(Altered("gguf", metadata, whole.tensors))


@settings(max_examples=150)
@given(data=st.data())
def test_wrong_config_json_never_ends_in_another_error(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(tiny.FAMILIES))
    whole = pristine(family, "hub")
    config = json.loads(json.dumps(whole.metadata["config"]))
    for key in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=2, unique=True)):
        config[key] = data.draw(WEIRD.filter(lambda value: not isinstance(value, bytes)))
    survives(Altered("safetensors", dict(whole.metadata) | {"config": config}, whole.tensors))


def survives(source: ModelSource) -> None:
    """Refused in words, unless the change is one that no weight contradicts (an epsilon, a rotary base)."""
    try:
        plan(source)
    except TurbomoeError as error:
        assert isinstance(error, ModelError) and 10 < len(str(error)) < 800


@pytest.mark.parametrize(("name", "said"), [("gpu", "no device 'gpu'"), ("cuda", "sees no CUDA GPU")])
def test_a_device_that_is_not_there_is_refused(name: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SettingsError, match=said):
        usable_device(name)
    assert usable_device("cpu").type == "cpu"
