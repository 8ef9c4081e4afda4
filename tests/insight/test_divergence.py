"""The judge is judged: against itself, against an own computation in float64, against a plain forward pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiny_models import logits, tiny_model, tokens, write_gguf
from turbomoe.config import EngineSettings, KVSettings
from turbomoe.engine.calibrate import means_for
from turbomoe.engine.runner import ModelRunner
from turbomoe.experts.base import Phase
from turbomoe.insight import divergence
from turbomoe.insight.divergence import Divergence, compare, comparison_use, label_of
from turbomoe.kv.cache import KVCache
from turbomoe.models import load_model
from turbomoe.models.base import Forecast, LoadedModel

LENGTH = 200
BARE = (0, 0)  # no exact windows
SETTINGS = [KVSettings(t, t, *BARE) for t in ("bf16", "tq4", "tq3", "tq2")]


@pytest.fixture(scope="module")
def original():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def model(original, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(write_gguf(original, tmp_path_factory.mktemp("models") / "tiny.gguf"), EngineSettings())


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return tokens(LENGTH)[0].tolist()


@pytest.fixture(scope="module")
def verdicts(model: LoadedModel, ids: list[int]) -> dict[str, Divergence]:
    return {v.label: v for v in compare(model, ids, SETTINGS)}


def logits_of(model: LoadedModel, kv: KVSettings, ids: list[int], means=None) -> torch.Tensor:
    runner = ModelRunner(model, kv, slots=1, ctx_size=len(ids), means=means)
    return runner.forward([0], torch.tensor([ids]), Phase.PREFILL, keep=0)[0].double()


def test_reference_and_noise_floor_come_first(verdicts: dict[str, Divergence]) -> None:
    assert list(verdicts) == ["bf16 (reference)", "f32 (noise floor)", "bf16", "tq4 0/0", "tq3 0/0", "tq2 0/0"]
    assert {v.tokens for v in verdicts.values()} == {LENGTH}


@pytest.mark.parametrize("label", ["bf16 (reference)", "bf16"])
def test_the_reference_does_not_differ_from_itself(verdicts: dict[str, Divergence], label: str) -> None:
    same = verdicts[label]
    assert (same.mean_kl, same.median_kl, same.kl_99_9, same.same_top) == (0.0, 0.0, 0.0, 1.0)


def test_the_noise_floor_is_small_but_there(verdicts: dict[str, Divergence]) -> None:
    floor = verdicts["f32 (noise floor)"]
    assert 0 < floor.mean_kl < 1e-4 and floor.kl_99_9 < 1e-3 and floor.same_top > 0.98


def test_fewer_bits_are_worse(verdicts: dict[str, Divergence]) -> None:
    kls = [verdicts[f"{name} 0/0"].mean_kl for name in ("tq4", "tq3", "tq2")]
    assert verdicts["f32 (noise floor)"].mean_kl < kls[0] < kls[1] < kls[2]
    assert verdicts["tq2 0/0"].same_top < verdicts["tq4 0/0"].same_top < 1


def test_figures_equal_an_own_computation_in_float64(model, ids, verdicts: dict[str, Divergence]) -> None:
    from turbomoe.engine.calibrate import means_for

    kv = SETTINGS[2]
    p = logits_of(model, divergence.REFERENCE, ids).softmax(-1)
    q = logits_of(model, kv, ids, means_for(model, kv)).softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    found = verdicts["tq3 0/0"]
    assert found.mean_kl == pytest.approx(float(kl.mean()), rel=1e-3)
    assert found.median_kl == pytest.approx(float(kl.sort().values[(LENGTH - 1) // 2]), rel=1e-2)
    assert float(kl.sort().values[-2]) <= found.kl_99_9 <= float(kl.max()) * (1 + 1e-3)
    assert found.same_top == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    surprise = -q[range(LENGTH - 1), ids[1:]].log()
    assert found.perplexity == pytest.approx(float(surprise.mean().exp()), rel=1e-4)


def test_perplexity_of_an_exact_cache_is_the_plain_model_s(original, ids, verdicts: dict[str, Divergence]) -> None:
    plain = logits(original, torch.tensor([ids]))[0, :-1].double()
    loss = torch.nn.functional.cross_entropy(plain, torch.tensor(ids[1:]))
    assert verdicts["f32 (noise floor)"].perplexity == pytest.approx(float(loss.exp()), rel=1e-4)


@pytest.mark.parametrize("chunk", [1, 64, 199, 200, 500])
def test_chunks_do_not_matter_nor_their_borders(model, ids, verdicts, monkeypatch, chunk: int) -> None:
    """The token after a chunk's last one is a target too."""
    monkeypatch.setattr(divergence, "CHUNK", chunk)
    short = ids if chunk > 1 else ids[:40]
    told: list[tuple[int, int]] = []
    found = compare(model, short, [SETTINGS[2]], lambda done, total: told.append((done, total)))
    expected = list(verdicts.values()) if chunk > 1 else compare_whole(model, short, monkeypatch)
    assert found[1].perplexity == pytest.approx(expected[1].perplexity, rel=1e-4)
    assert found[2].mean_kl == pytest.approx(next(v for v in expected if v.label == "tq3 0/0").mean_kl, rel=2e-2)
    assert told[-1] == (len(short), len(short)) and len(told) == -(-len(short) // chunk) + 1


def compare_whole(model: LoadedModel, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> list[Divergence]:
    with monkeypatch.context() as patch:
        patch.setattr(divergence, "CHUNK", 256)
        return compare(model, ids, [SETTINGS[2]])


def test_bits_and_bytes_are_the_cache_s_own(model: LoadedModel, verdicts: dict[str, Divergence]) -> None:
    for kv in SETTINGS:
        cache = KVCache(model.layers, kv, slots=1, ctx_size=LENGTH, device="meta")
        found = verdicts[label_of(kv)]
        assert (found.bits_per_value, found.kv_bytes) == (cache.bits_per_value(), cache.nbytes())
    bits = [verdicts[label_of(kv)].bits_per_value for kv in SETTINGS]
    assert bits == sorted(bits, reverse=True) and len(set(bits)) == 4


def test_exact_windows_help(model: LoadedModel, ids: list[int]) -> None:
    bare, windowed = compare(model, ids, [KVSettings("tq2", "tq2", 0, 0), KVSettings("tq2", "tq2", 16, 64)])[2:]
    assert windowed.mean_kl < bare.mean_kl
    assert windowed.bits_per_value > bare.bits_per_value


def test_means_are_used_where_the_settings_ask_for_them(model: LoadedModel, ids: list[int]) -> None:
    with_means, without = compare(model, ids, [SETTINGS[3], KVSettings("tq2", "tq2", 0, 0, means=False)])[2:]
    assert without.label == "tq2 0/0 no means" and with_means.mean_kl != without.mean_kl


def test_others_bring_means_of_their_own(model: LoadedModel, ids: list[int]) -> None:
    kv = SETTINGS[3]
    means = means_for(model, kv)
    assert means is not None
    larger = replace(means, keys={layer: 9 * mean for layer, mean in means.keys.items()})
    others = {"same": (kv, means), "worse": (kv, larger)}
    own, same, worse = compare(model, ids, [kv], others=others)[2:]
    assert (same.label, worse.label) == ("same", "worse")
    assert replace(same, label=own.label) == own
    assert worse.mean_kl != own.mean_kl


def test_two_tokens_are_enough(model: LoadedModel) -> None:
    (reference, _) = compare(model, [5, 6], [])
    assert reference.tokens == 2 and reference.perplexity > 1


LABELS = {
    "tq3 64/256": KVSettings("tq3", "tq3"),
    "K tq4 V tq3 0/128": KVSettings("tq4", "tq3", 0, 128),
    "tq2 0/0 no means": KVSettings("tq2", "tq2", 0, 0, means=False),
    "K bf16 V tq3 64/256": KVSettings("bf16", "tq3"),
    "bf16": KVSettings("bf16", "bf16"),
    "K bf16 V f32": KVSettings("bf16", "f32"),
}


@pytest.mark.parametrize(("label", "kv"), LABELS.items())
def test_labels(label: str, kv: KVSettings) -> None:
    assert label_of(kv) == label


def test_the_forecast_counts_every_arm(original, tmp_path: Path) -> None:
    seen: list[Forecast] = []
    load_model(write_gguf(original, tmp_path / "tiny.gguf"), EngineSettings(), before=seen.append)
    (forecast,) = seen
    use = comparison_use(forecast, EngineSettings(ctx_size=LENGTH), SETTINGS)
    arms = [divergence.REFERENCE, divergence.NOISE, *SETTINGS]
    caches = [KVCache(forecast.layers, kv, slots=1, ctx_size=LENGTH, device="meta").nbytes() for kv in arms]
    assert use.kv == sum(caches)
    assert use.weights == forecast.weight_bytes
