"""Means are found once for a model, kept beside it, checked when they are read, and taken again when in doubt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.engine.scripted import scripted_model
from tests.tiny_models import FAMILIES, tiny_model, write_gguf
from turbomoe.config import EngineSettings, KVSettings
from turbomoe.engine import calibrate
from turbomoe.engine.calibrate import calibration_ids, is_calibrated, means_for, means_path, needs_means
from turbomoe.engine.runner import ModelRunner
from turbomoe.experts.base import Phase
from turbomoe.kv.fit import TransformFit
from turbomoe.kv.means import KVMeans
from turbomoe.kv.shape import AttentionShape
from turbomoe.models import load_model
from turbomoe.models.base import LoadedModel
from turbomoe.notices import StrictError, board
from turbomoe.upstream.rotary import rotary_frequencies

CODES = KVSettings("tq3", "tq3")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedModel]:
    folder = tmp_path_factory.mktemp("models")
    return {f: load_model(write_gguf(tiny_model(f), folder / f"{f}.gguf"), EngineSettings()) for f in FAMILIES}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every forward pass."""
    seen: list[int] = []
    forward = ModelRunner.forward

    def counting(self, slots, ids, phase, keep=1):
        seen.append(ids.numel())
        return forward(self, slots, ids, phase, keep)

    monkeypatch.setattr(ModelRunner, "forward", counting)
    return seen


@pytest.fixture(autouse=True)
def fresh_board(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "strict", False)
    monkeypatch.setattr(board, "counts", type(board.counts)())
    monkeypatch.setattr(board, "_printed", set())


def full_layers(model: LoadedModel) -> set[int]:
    return {s.layer for s in model.layers if isinstance(s, AttentionShape) and not s.window}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_means_of_its_full_attention_layers_alone(models, family, state_home: Path) -> None:
    model = models[family]
    means = means_for(model, CODES)
    assert means is not None and means.identity == model.identity
    layers = full_layers(model)
    assert set(means.keys) == set(means.values) == layers
    assert len(layers) == (1 if family in ("gemma3", "qwen35", "qwen35moe") else 3)  # the rest slides or recurs
    for shape in (s for s in model.layers if s.layer in layers):
        assert means.keys[shape.layer].shape == (shape.kv_heads, shape.head_dim)


@pytest.mark.parametrize("family", ["qwen2", "qwen35"])
def test_means_are_fitted_to_what_attention_stores(models, family: str, state_home: Path) -> None:
    """To the keys and values of a cache in float32, and with the angles by which the model turns them."""
    model = models[family]
    ids, layer = torch.tensor([calibration_ids(model)]), max(full_layers(model))
    runner = ModelRunner(model, KVSettings("f32", "f32"), slots=1, ctx_size=ids.shape[1])
    fit = TransformFit(ids.shape[1])
    runner.memory.observer = lambda at, *seen: fit.add(at, *seen) if at == layer else None
    runner.forward([0], ids, Phase.PREFILL)
    want, means = fit.finish(model.identity, rotary_frequencies(model.shell)), means_for(model, CODES)
    assert means is not None and len(means.frequencies) == (16 // 2 if family == "qwen2" else 8 // 2)
    for found, exact in ((means.keys, want.keys), (means.values, want.values), (means.scales, want.scales)):
        assert torch.allclose(found[layer], exact[layer], rtol=1e-4, atol=1e-5)
        assert found[layer].abs().max() > 1e-3


def test_angles_that_depend_on_the_length_are_told(models, state_home: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(models["llama"].shell.model.rotary_emb, "rope_type", "dynamic")
    means = means_for(models["llama"], CODES)
    assert means is not None and means.frequencies.shape == (0,)
    assert capsys.readouterr().err.count("key means do not turn with the position") == 1


def test_once_for_a_model_and_then_from_the_file(models, state_home: Path, passes: list[int], monkeypatch) -> None:
    model = models["llama"]
    monkeypatch.setattr(calibrate, "CHUNK", 100)
    told: list[tuple[int, int]] = []
    assert not is_calibrated(model, CODES)
    first = means_for(model, CODES, lambda done, total: told.append((done, total)))
    assert passes == [100, 100, 56] and told == [(0, 256), (100, 256), (200, 256), (256, 256)]
    assert is_calibrated(model, CODES)
    again = means_for(model, KVSettings("tq2", "bf16"))  # one constant per model, whatever the codec
    assert len(passes) == 3
    assert first is not None and again is not None and first.digest == again.digest


def test_the_size_of_the_chunks_does_not_matter(models, state_home: Path, monkeypatch) -> None:
    whole = calibrate.calibrate(models["qwen3"])
    monkeypatch.setattr(calibrate, "CHUNK", 33)
    pieces = calibrate.calibrate(models["qwen3"])
    for layer, mean in whole.keys.items():
        assert torch.allclose(mean, pieces.keys[layer], atol=1e-5)


@pytest.mark.parametrize("kv", [KVSettings(), KVSettings("q8_0", "q8_0"), KVSettings("tq3", "tq3", means=False)])
def test_settings_that_use_no_means_do_not_run_the_model(models, state_home, passes, kv: KVSettings) -> None:
    model = replace(models["llama"], layers=tuple(replace(s, head_dim=32) for s in models["llama"].layers))
    assert means_for(model, kv) is None and is_calibrated(model, kv)
    assert passes == [] and not state_home.exists()


def test_a_model_that_only_slides_needs_none(models) -> None:
    model = models["gemma3"]
    sliding = tuple(s for s in model.layers if s.layer not in full_layers(model))
    assert needs_means(model, CODES) and not needs_means(replace(model, layers=sliding), CODES)


def test_means_of_another_model_are_refused_and_taken_again(models, state_home: Path, passes, capsys) -> None:
    model, other = models["llama"], replace(models["llama"], identity="f" * 64)
    means = means_for(other, CODES)
    assert means is not None
    path = means_path(model.identity)
    path.parent.mkdir(parents=True)
    path.write_bytes(means_path(other.identity).read_bytes())
    passes.clear()
    again = means_for(model, CODES)
    assert again is not None and again.identity == model.identity and passes
    assert board.counts["calibrating again"] == 1
    assert "belongs to another model" in capsys.readouterr().err
    passes.clear()
    means_for(model, CODES)
    assert not passes, "the good ones replaced the wrong ones"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_damaged_file_is_told_and_replaced(models, state_home: Path, passes, share: float, capsys) -> None:
    model = models["qwen2"]
    good = means_for(model, CODES)
    path = means_path(model.identity)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    passes.clear()
    again = means_for(model, CODES)
    assert passes and board.counts["calibrating again"] == 1
    assert str(path) in capsys.readouterr().err
    assert good is not None and again is not None and good.digest == again.digest
    assert KVMeans.load(path, model.identity).digest == good.digest


def test_one_flipped_bit_is_noticed(models, state_home: Path, passes) -> None:
    model = models["qwen2"]
    means_for(model, CODES)
    path = means_path(model.identity)
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    passes.clear()
    assert means_for(model, CODES) is not None and passes


def test_means_that_cannot_be_kept_are_used_and_told(models, state_home: Path, capsys) -> None:
    state_home.write_text("a file where the folder should be")
    means = means_for(models["llama"], CODES)
    assert means is not None and set(means.keys) == {0, 1, 2}
    said = capsys.readouterr().err
    assert said.count("note: the means are not kept") == 1 and "TURBOMOE_HOME" in said
    # The check of KV types and the engine ask again, in the same run.
    assert is_calibrated(models["llama"], CODES) and means_for(models["llama"], CODES) is means
    assert not is_calibrated(models["qwen2"], CODES)


def test_strictly_a_damaged_file_is_an_error(models, state_home: Path, monkeypatch) -> None:
    model = models["qwen2"]
    means_for(model, CODES)
    means_path(model.identity).write_bytes(b"")
    monkeypatch.setattr(board, "strict", True)
    with pytest.raises(StrictError, match="calibrating again"):
        means_for(model, CODES)


def test_means_of_an_older_version_are_fitted_again_and_told_even_strictly(
    models, state_home: Path, monkeypatch, capsys, passes
) -> None:
    model = models["qwen2"]
    with monkeypatch.context() as older:
        older.setattr("turbomoe.kv.means.VERSION", "1")
        means_for(model, CODES)
    passes.clear()
    monkeypatch.setattr(board, "strict", True)
    assert means_for(model, CODES) is not None and passes
    assert "note: calibrating again" in (said := capsys.readouterr().err) and "version '1'" in said
    KVMeans.load(means_path(model.identity), model.identity)
    with monkeypatch.context() as newer:
        newer.setattr("turbomoe.kv.means.VERSION", "1")  # what is there is of a version yet to come
        with pytest.raises(StrictError, match="calibrating again"):
            means_for(model, CODES)


@pytest.mark.parametrize(("context", "count"), [(1 << 17, calibrate.CALIBRATION_TOKENS), (100, 100)])
def test_the_built_in_text_is_long_enough_and_cut_to_length(context: int, count: int) -> None:
    assert len(calibration_ids(replace(scripted_model(), context_length=context))) == count


def test_a_model_without_a_tokenizer_gets_tokens_of_its_vocabulary(models) -> None:
    ids = calibration_ids(models["llama"])
    assert len(ids) == 256 and min(ids) >= 0 and max(ids) < 96 and len(set(ids)) == 96
