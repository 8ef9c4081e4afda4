"""``auto`` on tiny models: what is measured, how often, when not at all, and what the disk may do to it."""

from __future__ import annotations

import json
from dataclasses import replace
from math import inf, isfinite
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch

from tests.cli.tiny_chat import CONTEXT, write_chat_model
from turbomoe.config import EngineSettings, ExpertSettings, KVSettings
from turbomoe.engine.calibrate import calibration_ids, means_for, means_path
from turbomoe.engine.forecast import kv_bytes
from turbomoe.engine.runner import ModelRunner
from turbomoe.errors import ModelError, SettingsError
from turbomoe.experts.base import Phase
from turbomoe.files.atomic import write_bytes
from turbomoe.insight import kv_auto, kv_check, kv_ladder
from turbomoe.insight.kv_auto import known_kv_types, nothing_to_check, resolve_kv_types
from turbomoe.insight.kv_check import _error_of, check_ids, first_judged, measure
from turbomoe.insight.kv_ladder import candidates
from turbomoe.insight.kv_record import VERSION, load_checks, record_path
from turbomoe.insight.kv_search import ANCHOR, EXACT, LADDER, Measured
from turbomoe.insight.texts import judgement_text
from turbomoe.kv.cache import KVCache
from turbomoe.kv.means import KVMeans
from turbomoe.kv.shape import AttentionShape, RecurrentShape
from turbomoe.models import load_model
from turbomoe.models.base import Forecast, LoadedModel
from turbomoe.notices import StrictError, board
from turbomoe.upstream.prompts import encode_text

AUTO = KVSettings("auto", "auto", 4, 32)
CODES = KVSettings("tq2", "tq2")
WISH = EngineSettings(ctx_size=CONTEXT, kv=AUTO)


def load(path: Path, settings: EngineSettings = WISH) -> tuple[LoadedModel, Forecast]:
    told: list[Forecast] = []
    return load_model(path, settings, before=told.append), told[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def hybrid(folder: Path) -> tuple[LoadedModel, Forecast]:
    """One full-attention layer with heads of 32 among recurrent ones."""
    return load(write_chat_model(folder / "hybrid.gguf", family="qwen35"))


@pytest.fixture(scope="module")
def model(hybrid: tuple[LoadedModel, Forecast]) -> LoadedModel:
    return hybrid[0]


@pytest.fixture(scope="module")
def forecast(hybrid: tuple[LoadedModel, Forecast]) -> Forecast:
    return hybrid[1]


@pytest.fixture(scope="module")
def llama(folder: Path) -> LoadedModel:
    """Three full-attention layers with heads of 16, which q8_0 cannot store."""
    return load(write_chat_model(folder / "llama.gguf"))[0]


@pytest.fixture(autouse=True)
def fresh_board(monkeypatch: pytest.MonkeyPatch, state_home: Path) -> None:
    monkeypatch.setattr(board, "strict", False)
    monkeypatch.setattr(board, "counts", type(board.counts)())
    monkeypatch.setattr(board, "_printed", set())


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[set[tuple[str, str]]]:
    """The pairs of every pass over the text."""
    seen: list[set[tuple[str, str]]] = []

    def counting(model, kv, means, ids, limits, progress=None, pause=None):
        seen.append(set(limits))
        return measure(model, kv, means, ids, limits, progress, pause)

    monkeypatch.setattr(kv_auto, "measure", counting)
    return seen


# What is measured


def test_the_mean_is_that_of_positions_that_see_codes(model: LoadedModel) -> None:
    """Against two plain runs over the whole text; up to the first judged position nothing differs, there it does."""
    kv, ids = replace(AUTO, type_k="tq2", type_v="tq2"), check_ids(model, AUTO)
    assert len(ids) == CONTEXT
    runs = [
        ModelRunner(model, one, slots=1, ctx_size=len(ids), means=means, measuring=True)
        for one, means in ((KVSettings(), None), (kv, means_for(model, kv)))
    ]
    p, q = (run.forward([0], torch.tensor([ids]), Phase.PREFILL, keep=0)[0].double().log_softmax(-1) for run in runs)
    kl = (p.exp() * (p - q)).sum(-1)
    first = first_judged(AUTO)
    assert first == 4 + 32 + 1 and kl[:first].max() < 1e-9 < kl[first]
    found = measure(model, AUTO, means_for(model, CODES), ids, {("tq2", "tq2"): 1e9})[("tq2", "tq2")]
    assert (found.tokens, found.of) == (CONTEXT - first, CONTEXT - first)
    assert found.kl == pytest.approx(float(kl[first:].mean()), rel=2e-2)


def test_the_size_of_the_chunks_does_not_matter(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, limits = check_ids(model, AUTO)[:150], {("tq3", "tq2"): 1e9}
    one = measure(model, AUTO, means_for(model, CODES), ids, limits)[("tq3", "tq2")]
    monkeypatch.setattr(kv_check, "CHUNK", 7)
    monkeypatch.setattr(kv_check, "UNJUDGED_CHUNK", 10)
    other = measure(model, AUTO, means_for(model, CODES), ids, limits)[("tq3", "tq2")]
    assert other.kl == pytest.approx(one.kl, rel=5e-2) and other.tokens == one.tokens


def test_a_pair_is_given_up_when_it_cannot_make_it_any_more(model: LoadedModel) -> None:
    ids = check_ids(model, AUTO)
    told: list[tuple[int, int]] = []
    limits = {("tq4", "tq4"): 1e9, ("tq2", "tq2"): 1e-7}
    found = measure(model, AUTO, means_for(model, CODES), ids, limits, lambda done, total: told.append((done, total)))
    assert found[("tq4", "tq4")].tokens == CONTEXT - first_judged(AUTO)
    assert found[("tq2", "tq2")].tokens == kv_check.CHUNK and found[("tq2", "tq2")].at_least > 1e-7
    assert told[0] == (0, CONTEXT) and told[-1] == (CONTEXT, CONTEXT)
    alone = measure(model, AUTO, means_for(model, CODES), ids, {("tq2", "tq2"): 1e-7})
    assert alone[("tq2", "tq2")] == found[("tq2", "tq2")], "who runs beside it does not matter"


def test_the_text_is_neither_the_calibration_s_nor_the_beginning_that_eval_reads(model: LoadedModel) -> None:
    large = replace(model, context_length=1 << 17)
    ids = check_ids(large, KVSettings("auto", "auto"))
    assert len(ids) == kv_check.TOKENS
    whole = encode_text(model.tokenizer, judgement_text())
    assert ids[64:128] == find(whole, ids[64:128], after=len(whole) // 2)
    assert calibration_ids(large)[100:140] != find(ids, calibration_ids(large)[100:140])
    assert len(check_ids(large, KVSettings("auto", "auto", 128, 4096))) > 4096 + kv_check.JUDGED


def find(ids: list[int], wanted: list[int], after: int = 0) -> list[int] | None:
    places = range(after, len(ids) - len(wanted) + 1)
    return next((ids[at : at + len(wanted)] for at in places if ids[at : at + len(wanted)] == wanted), None)


def test_a_check_teaches_the_expert_cache_nothing(folder: Path) -> None:
    wish = replace(WISH, experts=ExpertSettings(cache=1 << 20))
    moe, _ = load(write_chat_model(folder / "moe.gguf", family="qwen35moe"), wish)
    assert moe.experts is not None and moe.experts.cache is not None
    before = moe.experts.describe()
    resolve_kv_types(moe, wish)
    assert moe.experts.describe() == before


def test_what_a_check_may_try_at_most(model: LoadedModel, checks) -> None:
    """Two sides: where nothing passes but bf16, the whole ladder is tried beside it as well."""
    resolve_kv_types(model, replace(WISH, kv=replace(AUTO, budget=1e-9)))
    assert len(set().union(*checks)) == kv_ladder.most_pairs(model, AUTO) == 2 * len(LADDER) + 1
    checks.clear()
    one = replace(AUTO, type_k="tq4")
    resolve_kv_types(model, replace(WISH, kv=one))
    assert len(set().union(*checks)) == kv_ladder.most_pairs(model, one) == len(LADDER) + 1


# Pairs that compute nonsense


def break_types(monkeypatch: pytest.MonkeyPatch, *broken: str, after: int = 0) -> None:
    """Logits are not a number under any pair that has a type of ``broken``, past ``after`` tokens."""
    forward = ModelRunner.forward

    def broken_forward(runner: ModelRunner, slots, ids, phase, keep=1):
        logits, kv = forward(runner, slots, ids, phase, keep), runner.memory.settings
        hit = runner.memory.host_lengths[0] > after and {kv.type_k, kv.type_v} & set(broken)
        return logits * torch.nan if hit else logits

    monkeypatch.setattr(ModelRunner, "forward", broken_forward)


def test_a_pair_that_computes_nonsense_fails_alone(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever that begins: within the windows, or later, when the mean up to there is kept."""
    ids, limits, means = check_ids(model, AUTO), dict.fromkeys([("tq3", "tq3"), ("tq2", "tq2")], inf), None
    whole = measure(model, AUTO, means, ids, limits)
    for after, tokens in ((0, 0), (first_judged(AUTO) + 2 * kv_check.CHUNK, 2 * kv_check.CHUNK)):
        with monkeypatch.context() as patch:
            break_types(patch, "tq2", after=after)
            found = measure(model, AUTO, means, ids, limits)
        assert found[("tq3", "tq3")] == whole[("tq3", "tq3")]
        failed = found[("tq2", "tq2")]
        assert failed.failed and failed.tokens == tokens and isfinite(failed.kl) and failed.at_least == inf


def test_a_model_that_computes_nonsense_is_an_error(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    break_types(monkeypatch, "bf16")
    with pytest.raises(ModelError, match="not finite"):
        measure(model, AUTO, None, check_ids(model, AUTO), {ANCHOR: inf})


def test_the_choice_is_made_among_the_others_and_one_note_says_so(model, forecast, checks, monkeypatch, capsys) -> None:
    monkeypatch.setattr(board, "strict", True)
    break_types(monkeypatch, *LADDER[2:])
    first = resolve_kv_types(model, WISH)
    said, count = capsys.readouterr().err, len(checks)
    assert board.counts["KV types left out of the choice"] == 1
    assert f"{LADDER[2]}/{LADDER[2]}" in said and "numbers that are not finite" in said
    assert {first.kv.type_k, first.kv.type_v} <= {EXACT, *LADDER[:2]} and first.kv_choice is not None
    json.dumps(first.kv_choice.to_json(), allow_nan=False)
    known = known_kv_types(forecast, WISH)
    assert (known, known and known.kv_choice) == (first, first.kv_choice)
    assert resolve_kv_types(model, WISH) == first and len(checks) == count, "failures are remembered"
    assert board.counts["KV types left out of the choice"] == 1


def test_bf16_where_all_codes_compute_nonsense(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    break_types(monkeypatch, *LADDER)
    choice = resolve_kv_types(model, WISH).kv_choice
    assert choice is not None and (choice.budget, choice.q8_0, choice.mean_kl) == (0.02, None, None)
    assert choice.line() == (
        "KV cache: keys bf16, values bf16 (budget 0.020); keys and values stay at bf16: at q8_0 numbers are not finite"
    )


# Once


def test_once_for_a_model_and_then_from_the_file(model: LoadedModel, forecast: Forecast, checks) -> None:
    assert known_kv_types(forecast, WISH) is None
    first = resolve_kv_types(model, WISH)
    assert 1 <= len(checks) <= 3 and checks[0] == {(name, name) for name in LADDER}
    choice, count = first.kv_choice, len(checks)
    assert choice is not None and choice.mean_kl is not None and choice.budget == 0.02
    assert (first.kv.type_k, first.kv.type_v) == (choice.type_k, choice.type_v) and not first.kv.is_auto
    assert 0 < choice.mean_kl <= choice.budget and choice.tokens == CONTEXT - first_judged(AUTO)
    again = resolve_kv_types(model, WISH)
    assert len(checks) == count and (again, again.kv_choice) == (first, first.kv_choice)
    known = known_kv_types(forecast, WISH)
    assert (known, known and known.kv_choice) == (first, first.kv_choice)
    on_disk = load_checks(record_path(model.identity), model.identity)
    assert [len(arms) for arms in on_disk.values()] == [len(choice.tried)]


def test_the_chosen_types_are_what_a_cache_is_built_of(model: LoadedModel) -> None:
    settings = resolve_kv_types(model, WISH)
    assert settings == replace(WISH, kv=replace(AUTO, type_k=settings.kv.type_k, type_v=settings.kv.type_v))
    KVCache(model.layers, settings.kv, slots=1, ctx_size=64)
    with pytest.raises(SettingsError, match="KV types are still auto"):
        KVCache(model.layers, AUTO, slots=1, ctx_size=64)
    with pytest.raises(SettingsError, match="KV types are still auto"):
        KVCache((), replace(AUTO, type_k="bf16"), slots=1, ctx_size=64)


def test_given_types_are_left_alone(model: LoadedModel, forecast: Forecast, checks, state_home: Path) -> None:
    settings = replace(WISH, kv=KVSettings("tq3", "tq2"))
    assert resolve_kv_types(model, settings) is settings and known_kv_types(forecast, settings) is settings
    assert checks == [] and not state_home.exists()


def test_one_given_side_is_kept(model: LoadedModel, checks) -> None:
    settings = resolve_kv_types(model, replace(WISH, kv=replace(AUTO, type_k="tq4")))
    assert settings.kv.type_k == "tq4" and settings.kv.type_v in LADDER
    assert checks == [{ANCHOR, *(("tq4", name) for name in LADDER)}]


def test_another_budget_measures_what_it_lacks(model: LoadedModel, checks) -> None:
    resolve_kv_types(model, WISH)
    done = set().union(*checks)
    checks.clear()
    tight = resolve_kv_types(model, replace(WISH, kv=replace(AUTO, budget=1e-6)))
    assert tight.kv.type_k in (EXACT, "q8_0") and tight.kv.budget is None
    assert tight.kv_choice is not None and tight.kv_choice.budget == 1e-6
    assert not done & set().union(*checks), "what ran to its end is known"
    checks.clear()
    wide = resolve_kv_types(model, replace(WISH, kv=replace(AUTO, budget=50.0)))
    assert wide.kv.type_k == wide.kv.type_v == LADDER[-1]


def test_other_windows_are_another_check_and_both_are_kept(model: LoadedModel, checks) -> None:
    wider = replace(WISH, kv=replace(AUTO, recent=64))
    for settings in (WISH, wider):
        resolve_kv_types(model, settings)
    checks.clear()
    for settings in (WISH, wider):
        resolve_kv_types(model, settings)
    assert checks == []


@pytest.mark.parametrize("other", [replace(WISH, dtype="float32"), replace(WISH, kv=replace(AUTO, means=False))])
def test_other_arithmetic_and_no_means_are_other_checks_and_kept_too(model, forecast, checks, other) -> None:
    for settings in (WISH, other):
        assert known_kv_types(forecast, settings) is None
        resolve_kv_types(model, settings)
    assert not board.counts
    checks.clear()
    assert [resolve_kv_types(model, settings) for settings in (WISH, other)]
    assert checks == [] and len(load_checks(record_path(model.identity), model.identity)) == 2


# Reasons


def test_wide_keys_say_why(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def judge(model, kv, means, ids, limits, progress=None, pause=None):
        return {pair: Measured(0.0041 if pair[0] in (EXACT, "q8_0") else 0.36, 100, 100) for pair in limits}

    monkeypatch.setattr(kv_auto, "measure", judge)
    choice = resolve_kv_types(model, WISH).kv_choice
    assert choice is not None
    assert choice.why == choice.to_json()["why"] == f"keys stay at q8_0: at {LADDER[1]} KL is 0.36"
    figures = "(KL 0.0041, budget 0.020, q8_0 0.0041)"
    assert choice.line() == f"KV cache: keys q8_0, values {LADDER[-1]} {figures}; {choice.why}"


def test_bf16_says_why(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def judge(model, kv, means, ids, limits, progress=None, pause=None):
        return {pair: Measured(0.5, 100, 100) for pair in limits}

    monkeypatch.setattr(kv_auto, "measure", judge)
    settings = resolve_kv_types(model, replace(WISH, kv=replace(AUTO, budget=0.02)))
    assert (settings.kv.type_k, settings.kv.type_v) == (EXACT, EXACT) and settings.kv_choice is not None
    assert settings.kv_choice.line() == (
        "KV cache: keys bf16, values bf16 (budget 0.020, q8_0 0.500); keys and values stay at bf16: at q8_0 KL is 0.5"
    )


def test_a_type_that_the_heads_do_not_fit_is_skipped_with_the_reason(llama: LoadedModel, checks, monkeypatch) -> None:
    monkeypatch.setattr(kv_ladder, "LADDER", ("q8_0", "tq4", "tq3", "tq2"))
    choice = resolve_kv_types(llama, WISH).kv_choice
    assert choice is not None and set(choice.skipped) == {"q8_0"} and "blocks of 32" in choice.skipped["q8_0"]
    assert choice.q8_0 is None and choice.budget == 0.02
    assert not any("q8_0" in pair for pairs in checks for pair in pairs)


def test_without_a_compiled_encoder_the_ladder_is_scalar(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_ladder, "load_core", lambda: None)
    assert kv_ladder.ladder_of(model.layers).types == kv_ladder.SCALAR


def test_heads_that_fit_eight_bits_alone_say_so(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = replace(model, layers=(AttentionShape(0, 2, 1, 96),))
    monkeypatch.setattr(kv_auto, "measure", lambda *rest: {ANCHOR: Measured(0.004, 100, 100)})
    choice = resolve_kv_types(wide, WISH).kv_choice
    assert choice is not None and set(choice.skipped) == set(LADDER) - {"q8_0"}
    assert choice.line().endswith("; keys and values stay at q8_0: its heads do not fit narrower types")


# Nothing to check


def test_a_context_within_the_windows_is_exact_anyway(model: LoadedModel, forecast: Forecast, checks) -> None:
    for size, gain in ((36, False), (37, True)):
        settings = replace(WISH, ctx_size=size)
        known = known_kv_types(forecast, settings)
        assert (known is None) == gain == (not nothing_to_check(model, settings))
    choice = resolve_kv_types(model, replace(WISH, ctx_size=36)).kv_choice
    assert choice is not None and (choice.type_k, choice.why) == (
        EXACT, "a context of at most 36 tokens lies in the exact windows",
    )  # fmt: skip
    assert checks == []


def nothing_grows(model: LoadedModel) -> LoadedModel:
    sliding = AttentionShape(1, 2, 1, 64, window=16)
    return replace(model, layers=(RecurrentShape(0, (8, 4), (2, 4, 4)), sliding))


ODD = {
    "no tokenizer": lambda model: replace(model, tokenizer=None),
    "nothing grows": nothing_grows,
    "odd heads": lambda model: replace(model, layers=(AttentionShape(0, 2, 1, 20),)),
    "little context": lambda model: replace(model, context_length=100),
}


@pytest.mark.parametrize("name", ODD)
def test_bf16_without_a_check_and_without_a_word(model: LoadedModel, checks, capsys, state_home: Path, name) -> None:
    settings = resolve_kv_types(ODD[name](model), WISH)
    assert (settings.kv.type_k, settings.kv.type_v) == (EXACT, EXACT)
    assert settings.kv_choice is not None and settings.kv_choice.why and not settings.kv_choice.tried
    assert checks == [] and not board.counts and capsys.readouterr().err == "" and not state_home.exists()


def test_a_given_side_stays_where_nothing_is_checked(model: LoadedModel) -> None:
    settings = replace(WISH, ctx_size=36, kv=replace(AUTO, type_v="tq3"))
    assert (resolve_kv_types(model, settings).kv.type_k, resolve_kv_types(model, settings).kv.type_v) == (EXACT, "tq3")


# The disk


DAMAGED = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:200]),
    "another number": lambda path: path.write_bytes(path.read_bytes().replace(b'"kl": ', b'"kl": 1', 1)),
    "another model's": lambda path: path.write_text(path.read_text().replace('"identity": "', '"identity": "0')),
    "an older version": lambda path: path.write_text(
        path.read_text().replace(f'"version": {VERSION}', f'"version": {VERSION - 1}')
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_file_that_cannot_be_used_is_told_and_replaced(model, forecast, checks, name: str, capsys) -> None:
    first = resolve_kv_types(model, WISH)
    path = record_path(model.identity)
    DAMAGED[name](path)
    checks.clear()
    assert known_kv_types(forecast, WISH) is None and not board.counts
    assert resolve_kv_types(model, WISH) == first and checks
    assert board.counts["checking the KV types again"] == 1 and str(path) in capsys.readouterr().err
    checks.clear()
    assert resolve_kv_types(model, WISH) == first and checks == []


def test_other_means_are_another_check(model: LoadedModel, forecast: Forecast, checks) -> None:
    resolve_kv_types(model, WISH)
    means = KVMeans.load(means_path(model.identity), model.identity)
    moved = KVMeans({layer: mean + 1e-4 for layer, mean in means.keys.items()}, means.values, model.identity)
    moved.save(means_path(model.identity))
    checks.clear()
    assert known_kv_types(forecast, WISH) is None
    resolve_kv_types(model, WISH)
    assert checks and board.counts["checking the KV types again"] == 1
    assert len(load_checks(record_path(model.identity), model.identity)) == 1, "what is stale is gone"


def test_without_means_on_disk_nothing_is_known(model: LoadedModel, forecast: Forecast) -> None:
    resolve_kv_types(model, WISH)
    means_path(model.identity).unlink()
    assert known_kv_types(forecast, WISH) is None


def test_what_cannot_be_kept_is_used_and_told(model: LoadedModel, state_home: Path, capsys) -> None:
    state_home.write_text("a file where the folder should be")
    settings = resolve_kv_types(model, WISH)
    assert not settings.kv.is_auto and settings.kv_choice is not None and settings.kv_choice.tried
    said = capsys.readouterr().err
    assert "note: the KV types are not kept" in said and "note: the means are not kept" in said
    assert board.counts["the means are not kept"] == 1, "calibrated once, not for every pair"


def test_strictly_a_damaged_file_is_an_error(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_kv_types(model, WISH)
    write_bytes(record_path(model.identity), b"{}")
    monkeypatch.setattr(board, "strict", True)
    with pytest.raises(StrictError, match="checking the KV types again"):
        resolve_kv_types(model, WISH)


def test_strictly_other_means_are_no_error(model: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """They are fitted again when their version changes."""
    monkeypatch.setattr(kv_auto, "measure", lambda *rest: {pair: Measured(0.004, 9, 9) for pair in rest[4]})
    resolve_kv_types(model, WISH)
    monkeypatch.setattr(kv_auto, "_basis", lambda means: "f" * 64)
    monkeypatch.setattr(board, "strict", True)
    assert not resolve_kv_types(model, WISH).kv.is_auto
    assert "note: checking the KV types again: the means have changed" in capsys.readouterr().err


# The forecast


@pytest.mark.parametrize("size", [40, 100, 101, 512, 4096 + 37])
def test_every_answer_lies_between_the_candidates(forecast: Forecast, size: int) -> None:
    settings = replace(WISH, ctx_size=size)
    ends = [kv_bytes(forecast, settings, kv) for kv in candidates(forecast, AUTO)]
    for key in (EXACT, *LADDER):
        for value in (EXACT, *LADDER):
            assert min(ends) <= kv_bytes(forecast, settings, replace(AUTO, type_k=key, type_v=value)) <= max(ends)


def test_the_forecast_knows_the_model_s_identity(model: LoadedModel, forecast: Forecast) -> None:
    assert forecast.identity == model.identity != ""


def test_the_error_of_a_mean_over_chunks() -> None:
    """Of equal chunks it is the textbook's; a larger chunk weighs as many positions as it has."""
    means = [0.01, 0.03, 0.02, 0.08]
    equal = [(64 * mean, 64) for mean in means]
    assert _error_of(fmean(means), equal) == pytest.approx(stdev(means) / 2)
    assert _error_of(0.02, [(0.02 * n, n) for n in (64, 64, 7)]) == pytest.approx(0)
    assert _error_of(0.5, [(32.0, 64)]) == 0.0
