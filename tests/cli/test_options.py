"""Flags become settings, or a sentence that names the flag."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbomoe.cli.options import add_common, add_engine, add_model, engine_settings, model_reference, moe_cache
from turbomoe.config import EngineSettings, ExpertSettings, KVSettings
from turbomoe.errors import SettingsError
from turbomoe.notices import board


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="test")
    add_common(parser)
    add_model(parser)
    add_engine(parser)
    return parser.parse_args(["-m", "model.gguf", *arguments])


def settings(*arguments: str) -> EngineSettings:
    return engine_settings(parse(*arguments))


AUTO = KVSettings("auto", "auto")


def wish(**changes: Any) -> EngineSettings:
    """The settings model's own defaults, but KV types are chosen for the model."""
    return EngineSettings(**{"kv": AUTO, **changes})


def test_no_flag_is_the_settings_model_s_own_default_but_for_kv_types() -> None:
    assert settings() == wish()


FLAGS = {
    "-c 8192": wish(ctx_size=8192),
    "--ctx-size 0": wish(ctx_size=0),
    "-np 4": wish(parallel=4),
    "--parallel 4": wish(parallel=4),
    "-t 3": wish(threads=3),
    "--threads 3": wish(threads=3),
    "--dtype float32": wish(dtype="float32"),
    "-ctk tq3 -ctv tq2": wish(kv=KVSettings("tq3", "tq2")),
    "--cache-type-k turbo3 --cache-type-v q8_0": wish(kv=KVSettings("tq3", "q8_0")),
    "--kv-sink 0 --kv-recent 128": wish(kv=KVSettings("auto", "auto", sink=0, recent=128)),
    "-ctk TQ3 -ctv Turbo2_TCQ": wish(kv=KVSettings("tq3", "tcq2")),
    "-ctk Auto -ctv BF16": wish(kv=KVSettings("auto", "bf16")),
    "-ctk q8_0": wish(kv=KVSettings("q8_0", "auto")),
    "-ctv bf16": wish(kv=KVSettings("auto", "bf16")),
    "--kv-budget 0.05": wish(kv=KVSettings("auto", "auto", budget=0.05)),
    "--moe-cache auto": wish(experts=ExpertSettings(cache="auto")),
    "--moe-cache off": wish(experts=ExpertSettings(cache="off")),
    "--moe-cache 2G": wish(experts=ExpertSettings(cache=2 << 30)),
    "--moe-policy frozen": wish(experts=ExpertSettings(policy="frozen")),
    "--moe-policy lru": wish(experts=ExpertSettings(policy="lru")),
    "--moe-hysteresis 1.5": wish(experts=ExpertSettings(hysteresis=1.5)),
    "--moe-half-life 64": wish(experts=ExpertSettings(half_life=64.0)),
}


@pytest.mark.parametrize(("line", "expected"), FLAGS.items())
def test_a_flag_sets_its_setting_and_no_other(line: str, expected: EngineSettings) -> None:
    assert settings(*line.split()) == expected


OUT_OF_RANGE = {
    "-c -1": "--ctx-size",
    "-c 99999999": "--ctx-size",
    "-np 0": "--parallel",
    "-t -2": "--threads",
    "--kv-sink -1": "--kv-sink",
    "--kv-recent -1": "--kv-recent",
    "--kv-budget 0": "--kv-budget",
    "--kv-budget -0.1": "--kv-budget",
    "--kv-budget nan": "--kv-budget",
    "--kv-budget inf": "--kv-budget",
    "--moe-hysteresis 0.5": "--moe-hysteresis",
    "--moe-hysteresis nan": "--moe-hysteresis",
    "--moe-half-life 0": "--moe-half-life",
    "--moe-half-life nan": "--moe-half-life",
    "--moe-cache 5": "512M, 2G",
    "--moe-cache lots": "512M, 2G",
}


@pytest.mark.parametrize(("line", "named"), OUT_OF_RANGE.items())
def test_out_of_range_names_the_flag_or_the_form(line: str, named: str) -> None:
    with pytest.raises(SettingsError) as caught:
        settings(*line.split())
    assert named in str(caught.value)


@pytest.mark.parametrize("line", ["-c many", "-c 1.5", "-t", "--dtype int4", "--moe-policy lucky", "--moe-half-life x"])
def test_wrong_kind_of_value_is_a_usage_error(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*line.split())
    assert caught.value.code == 2
    assert f"argument {line.split()[0]}" in capsys.readouterr().err


@given(st.text(max_size=12))
def test_moe_cache_takes_any_text_or_says_what_it_wants(text: str) -> None:
    try:
        assert moe_cache(text) in ("off", "auto") or int(moe_cache(text)) >= 0
    except SettingsError as error:
        assert "2G" in str(error)


MODELS = {
    "-m model.gguf": "model.gguf",
    "--model demo:smollm2": "demo:smollm2",
    "-hf user/repo": "hf:user/repo",
    "-hf user/repo:Q4_K_M": "hf:user/repo:Q4_K_M",
    "--hf-repo hf:user/repo": "hf:user/repo",
}


@pytest.mark.parametrize(("line", "reference"), MODELS.items())
def test_model_reference(line: str, reference: str) -> None:
    parser = argparse.ArgumentParser()
    add_model(parser)
    assert model_reference(parser.parse_args(line.split())) == reference


@pytest.mark.parametrize("line", ["", "-m a -hf b/c"])
def test_exactly_one_model(line: str) -> None:
    parser = argparse.ArgumentParser()
    add_model(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(line.split())


@pytest.mark.parametrize("flag", ["-ngl 99", "--n-gpu-layers 99", "-ncmoe 10", "--n-cpu-moe 10", "--cpu-moe"])
def test_placement_flags_are_taken_and_answered(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sum(board.counts.values())
    assert settings(*flag.split()) == wish()
    assert sum(board.counts.values()) == before + 1


def test_placement_zero_is_what_happens_anyway() -> None:
    before = sum(board.counts.values())
    settings("-ngl", "0")
    assert sum(board.counts.values()) == before


def test_a_budget_with_nothing_to_choose_is_answered() -> None:
    before = board.counts["--kv-budget has no effect"]
    settings("-ctk", "tq4", "--kv-budget", "0.1")
    assert board.counts["--kv-budget has no effect"] == before
    settings("-ctk", "tq4", "-ctv", "tq4", "--kv-budget", "0.1")
    assert board.counts["--kv-budget has no effect"] == before + 1
