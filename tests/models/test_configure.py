"""A configuration rebuilt from GGUF metadata, or read from config.json, is the one the model was made with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import tiny_models as tiny
from tests.models.altered import Altered
from turbomoe.errors import ModelError
from turbomoe.files import open_model
from turbomoe.kv.shape import AttentionShape, RecurrentShape
from turbomoe.models.configure import read_config
from turbomoe.models.families import find_family
from turbomoe.models.shapes import ExpertShape, expert_shape, layer_shapes
from turbomoe.upstream.shell import make_config

# What no file says, or says only about how it was written.
UNSAID = {"architectures", "dtype", "transformers_version", "_name_or_path", "pad_token_id", "use_cache"}


def config_of(path: Path) -> Any:
    source = open_model(path)
    return read_config(source, find_family(source))


def plain(config: Any) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key not in UNSAID}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_configuration_from_gguf_equals_the_original(family: str, tmp_path: Path) -> None:
    model = tiny.tiny_model(family)
    found = plain(config_of(tiny.write_gguf(model, tmp_path / "model.gguf")))
    wanted = plain(model.config)
    assert found.pop("rms_norm_eps") == pytest.approx(wanted.pop("rms_norm_eps"), rel=1e-6)
    # transformers' Qwen2 keeps no head size of its own, and honours one that is given.
    assert found == {"head_dim": 16} | wanted


@pytest.mark.parametrize("composite", [False, True])
@pytest.mark.parametrize("family", [family for family, kind in tiny.TINY.items() if kind.composite])
def test_configuration_from_the_hub_equals_the_original(family: str, composite: bool, tmp_path: Path) -> None:
    model = tiny.tiny_model(family)
    found = config_of(tiny.write_hub(model, tmp_path / "hub", composite=composite))
    assert plain(found) == plain(model.config)


@pytest.mark.parametrize(("layers", "width", "heads", "scalar"), [(3, 64, 4, 32), (62, 96, 4, 24)])
def test_gemma_score_scale(layers: int, width: int, heads: int, scalar: int, tmp_path: Path) -> None:
    """The head size, but the hidden size per head in the 27B model, which has 62 layers."""
    kinds = ["sliding_attention" if (layer + 1) % 6 else "full_attention" for layer in range(layers)]
    model = tiny.tiny_model(
        "gemma3", num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, layer_types=kinds
    )
    config = config_of(tiny.write_gguf(model, tmp_path / "model.gguf"))
    assert config.query_pre_attn_scalar == scalar
    assert config.layer_types == kinds


def test_gemma_options_of_newer_files(tmp_path: Path) -> None:
    def add(writer: tiny.GGUFWriter) -> None:
        writer.add_sliding_window_pattern(2)
        writer.add_float32("gemma3.rope.freq_base_swa", 77.0)
        writer.add_final_logit_softcapping(30.0)

    config = config_of(tiny.write_gguf(tiny.tiny_model("gemma3"), tmp_path / "model.gguf", keys=add))
    assert config.layer_types[:4] == ["sliding_attention", "full_attention"] * 2
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 77.0
    assert config.final_logit_softcapping == 30.0


@pytest.mark.parametrize(
    ("key", "value"), [("scaling.type", "longrope"), ("scaling.attn_factor", 0.5), ("dimension_count", 16)]
)
def test_rotary_variants_that_we_would_compute_wrongly_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    def add(writer: tiny.GGUFWriter) -> None:
        if key != "scaling.type":
            writer.add_string("qwen3.rope.scaling.type", "yarn")
        full = f"qwen3.rope.{key}"
        kinds = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
        kinds[type(value)](full, value)

    with pytest.raises(ModelError, match=f"qwen3.rope.{key}"):
        config_of(tiny.write_gguf(tiny.tiny_model("qwen3"), tmp_path / "model.gguf", keys=add))


FLAT = {"rope_type": "default", "rope_theta": 10_000.0}


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}},
        {"rope_parameters": {"type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}},
        {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}},
        {"rope_parameters": {"rope_type": "proportional", "rope_theta": 10_000.0}},
        {"rope_parameters": {"rope_type": ["dynamic"]}},
        {"rope_parameters": {"rope_type": None}},
    ],
)
def test_rotary_types_that_we_would_compute_wrongly_are_refused_from_the_hub(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    path = tiny.write_hub(tiny.tiny_model("llama"), tmp_path / "hub", config=fields)
    with pytest.raises(ModelError, match=r"Rotary embeddings of the type .* are not supported"):
        config_of(path)


@pytest.mark.parametrize("at", ["full_attention", "sliding_attention"])
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_types_of_single_layer_types_are_checked(at: str, kind: str, tmp_path: Path) -> None:
    rope = {"full_attention": FLAT, "sliding_attention": FLAT} | {at: FLAT | {"rope_type": kind, "factor": 4.0}}
    path = tiny.write_hub(tiny.tiny_model("gemma3"), tmp_path / "hub", config={"rope_parameters": rope})
    with pytest.raises(ModelError, match=kind):
        config_of(path)


def test_yarn_betas(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 5_000.0, "factor": 4.0, "original_max_position_embeddings": 128}

    def add(writer: tiny.GGUFWriter) -> None:
        writer.add_float32("qwen3.rope.scaling.yarn_beta_fast", 16.0)
        writer.add_float32("qwen3.rope.scaling.yarn_beta_slow", 2.0)

    model = tiny.tiny_model("qwen3", rope_parameters=rope)
    config = config_of(tiny.write_gguf(model, tmp_path / "model.gguf", keys=add))
    assert config.rope_parameters == rope | {"beta_fast": 16.0, "beta_slow": 2.0}


@pytest.mark.parametrize("normed", [False, True])
def test_router_normalisation_can_be_switched_off_by_the_file(normed: bool, tmp_path: Path) -> None:
    def add(writer: tiny.GGUFWriter) -> None:
        writer.add_expert_weights_norm(normed)

    config = config_of(tiny.write_gguf(tiny.tiny_model("qwen3moe"), tmp_path / "model.gguf", keys=add))
    assert config.norm_topk_prob is normed


# ------------------------------------------------------------------------------------------- layer shapes


def test_layer_shapes_of_a_hybrid() -> None:
    shapes = layer_shapes(tiny.tiny_model("qwen35").config)
    # 2 key heads of 16 for queries and for keys, 6 value heads of 32.
    deltanet = ((2 * 2 * 16 + 6 * 32, 4), (6, 16, 32))
    assert shapes[:3] == tuple(RecurrentShape(layer, *deltanet) for layer in range(3))
    assert shapes[3] == AttentionShape(3, query_heads=4, kv_heads=2, head_dim=32)


@pytest.mark.filterwarnings("ignore:`past_key_values`")
def test_recurrent_shapes_are_those_of_the_stock_cache() -> None:
    from transformers import DynamicCache

    model = tiny.tiny_model("qwen35moe")
    cache = DynamicCache(config=model.config)
    model(input_ids=tiny.tokens(10), past_key_values=cache, use_cache=True)
    for layer in layer_shapes(model.config):
        if not isinstance(layer, RecurrentShape):
            continue
        state = cache.layers[layer.layer]
        conv, recurrent = state.conv_states, state.recurrent_states
        conv, recurrent = (next(iter(s.values())) if isinstance(s, dict) else s for s in (conv, recurrent))
        assert recurrent.shape[1:] == layer.state
        assert conv.shape[1] == layer.conv[0]


def test_windows_count_visible_tokens() -> None:
    """Gemma's mask lets position t see exactly ``window`` tokens, itself included."""
    kinds = ["sliding_attention"] * 2
    model = tiny.tiny_model("gemma3", num_hidden_layers=2, layer_types=kinds)
    window = layer_shapes(model.config)[0]
    assert isinstance(window, AttentionShape) and window.window == 8
    ids = tiny.tokens(20)
    wanted = model.model(input_ids=ids, output_attentions=True, use_cache=False).attentions
    assert ((wanted[0][0, 0, -1] > 0).sum(), (wanted[0][0, 0, 3] > 0).sum()) == (8, 4)


def test_a_qwen3_moe_that_slides_slides_everywhere() -> None:
    fields = {"use_sliding_window": True, "sliding_window": 16}
    config = make_config(tiny._BASE | tiny.TINY["qwen3moe"].fields | fields | {"model_type": "qwen3_moe"})
    assert [layer.window for layer in layer_shapes(config)] == [16, 16, 16]  # type: ignore[union-attr]
    assert [layer.window for layer in layer_shapes(tiny.tiny_model("qwen3moe").config)] == [0, 0, 0]  # type: ignore[union-attr]


def shapes_with(family: str, fields: dict[str, Any], folder: Path) -> list[int]:
    config = config_of(tiny.write_hub(tiny.tiny_model(family), folder, config=fields))
    return [layer.window for layer in layer_shapes(config)]  # type: ignore[union-attr]


QWEN2_SLIDES = {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None}


@pytest.mark.parametrize("window", [-5, -1, 1 << 40, (1 << 30) + 1, True, 8.5, "8", [8]])
@pytest.mark.parametrize(("family", "fields"), [("gemma3", {}), ("qwen2", QWEN2_SLIDES)])
def test_windows_have_limits(family: str, fields: dict[str, Any], window: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"sliding_window"):
        shapes_with(family, fields | {"sliding_window": window}, tmp_path / "hub")


@pytest.mark.parametrize("window", [0, None])
def test_a_window_of_nothing_is_no_window(window: int | None, tmp_path: Path) -> None:
    assert shapes_with("qwen2", QWEN2_SLIDES | {"sliding_window": window}, tmp_path / "hub") == [0, 0, 0]
    assert shapes_with("qwen2", QWEN2_SLIDES | {"sliding_window": 8}, tmp_path / "hub") == [0, 8, 8]
    with pytest.raises(ModelError, match=r"sliding_window .* not None.* slides"):
        shapes_with("gemma3", {"sliding_window": window}, tmp_path / "hub")


@pytest.mark.parametrize("sections", [["a", "b"], [3, 2.5], [True, 1], [3, -1], [3, 1 << 40], [1] * 5, [[3], [2]]])
def test_rotary_sections_are_checked_one_by_one(sections: list[Any], tmp_path: Path) -> None:
    source = open_model(tiny.write_gguf(tiny.tiny_model("qwen35"), tmp_path / "model.gguf"))
    key = "qwen35.rope.dimension_sections"
    altered = Altered("gguf", dict(source.metadata) | {key: sections}, source.tensors)
    with pytest.raises(ModelError, match=key):
        read_config(altered, find_family(altered))


def test_a_stray_window_in_a_llama_configuration_means_nothing() -> None:
    config = make_config(tiny._BASE | tiny.TINY["llama"].fields | {"model_type": "llama", "sliding_window": 16})
    assert [layer.window for layer in layer_shapes(config)] == [0, 0, 0]  # type: ignore[union-attr]


@pytest.mark.parametrize("kinds", [["full_attention"], ["full_attention", "full_attention", "chunked_attention"]])
def test_unknown_layer_types_are_refused(kinds: list[str]) -> None:
    config = tiny.tiny_model("qwen3").config
    config.layer_types = kinds
    with pytest.raises(ModelError, match=r"layer types|chunked_attention"):
        layer_shapes(config)


def test_expert_shape_comes_from_the_configuration() -> None:
    config = tiny.tiny_model("qwen35moe").config
    shape = expert_shape(config)
    assert shape == ExpertShape(num_experts=8, top_k=2, hidden=64, width=32, activation="silu")
    assert (shape.of("gate"), shape.of("up"), shape.of("down")) == ((32, 64), (32, 64), (64, 32))


@pytest.mark.parametrize(("key", "value"), [("hidden_act", "relu"), ("num_experts_per_tok", 9)])
def test_experts_that_we_cannot_compute_are_refused(key: str, value: Any) -> None:
    config = tiny.tiny_model("qwen35moe").config
    setattr(config, key, value)
    with pytest.raises(ModelError, match=str(value)):
        expert_shape(config)
