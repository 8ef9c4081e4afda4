"""``turbomoe eval``: the table, the JSON, what may be judged and on what text."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.tiny_chat import CONTEXT, Turbomoe, write_chat_model
from turbomoe.cli import main as cli
from turbomoe.cli.eval import SPEC_HELP, parse_spec
from turbomoe.config import KVSettings
from turbomoe.errors import SettingsError

FIELDS = [
    "label", "tokens", "perplexity", "mean_kl", "median_kl", "kl_99_9", "same_top", "bits_per_value", "kv_bytes",
]  # fmt: skip
SPECS = {
    "tq3": KVSettings("tq3", "tq3"),
    "tq4/tq3": KVSettings("tq4", "tq3"),
    "tcq2.5": KVSettings("tcq2.5", "tcq2.5"),
    "tcq3/tcq2.5@8+16": KVSettings("tcq3", "tcq2.5", 8, 16),
    "tcq2.5/tcq2": KVSettings("tcq2.5", "tcq2"),
    "turbo3": KVSettings("tq3", "tq3"),
    "TQ3/Turbo4@8+16": KVSettings("tq3", "tq4", 8, 16),
    "bf16/q8_0": KVSettings("bf16", "q8_0"),
    "tq4@128+1024": KVSettings("tq4", "tq4", 128, 1024),
    "tq3@0+0-means": KVSettings("tq3", "tq3", 0, 0, means=False),
    "tq3/tq2-means": KVSettings("tq3", "tq2", means=False),
}


@pytest.mark.parametrize(("spec", "settings"), SPECS.items())
def test_a_setting_in_short(spec: str, settings: KVSettings) -> None:
    assert parse_spec(spec) == settings


@pytest.mark.parametrize(
    "spec", ["", "tq3/", "/tq3", "tq3@", "tq3@1", "tq3@1+", "tq3 ", "tq3@-1+2", "tq3-mean", "a/b/c"]
)
def test_what_is_no_setting_is_told_with_the_form(spec: str) -> None:
    with pytest.raises(SettingsError) as error:
        parse_spec(spec)
    assert SPEC_HELP in str(error.value)


def test_windows_beyond_reason_are_refused() -> None:
    with pytest.raises(SettingsError, match="--kv-sink must be between"):
        parse_spec("tq3@9999999+0")


def test_the_table_is_on_standard_output_and_the_rest_is_not(turbomoe: Turbomoe, chat_model: Path) -> None:
    done = turbomoe("eval", "-m", chat_model, "--tokens", "100", "--kv", "tq2@0+0", "--kv", "tq4/tq3@8+16")
    assert done.code == 0, done.err
    heads, line, *rows = done.out.splitlines()
    names = [cell.strip() for cell in heads.strip("|").split("|")]
    assert names == ["KV cache", "bits/value", "perplexity", "mean KL", "median KL", "99.9% KL", "same top"]
    assert set(line) == set("|- ") and len({len(row) for row in (heads, line, *rows)}) == 1
    labels = [row.split("|")[1].strip() for row in rows]
    assert labels == ["bf16 (reference)", "f32 (noise floor)", "tq2 0/0", "K tq4 V tq3 8/16"]
    assert "tiny, 100 tokens of the first chapters of Moby-Dick" in done.err


def test_json(turbomoe: Turbomoe, chat_model: Path) -> None:
    report = turbomoe(
        "eval", "-m", chat_model, "--tokens", "64", "--json", "-ctk", "tq2", "-ctv", "bf16", "--kv-recent", "8"
    ).json
    assert list(report) == ["model", "text", "results", "no_position_saw_codes"]
    assert report["model"] == "tiny" and report["no_position_saw_codes"] == ["K tq2 V bf16 64/8"]
    assert [list(result) for result in report["results"]] == [FIELDS] * 3
    assert [r["label"] for r in report["results"]][2] == "K tq2 V bf16 64/8"
    assert all(r["tokens"] == 64 for r in report["results"])


def test_a_text_of_one_s_own(turbomoe: Turbomoe, chat_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("Grüße. " * 3)
    run = ("eval", "-m", chat_model, "--text", text, "--json", "--strict", "-ctk", "bf16", "-ctv", "bf16")
    done = turbomoe(*run)
    assert done.json["text"] == str(text) and len(done.json["results"]) == 2
    count = done.json["results"][0]["tokens"]
    assert 10 < count < 40 and "note" not in done.err
    done = turbomoe(*run, "--tokens", "100")
    assert done.json["results"][0]["tokens"] == count
    assert f"note: {count} tokens are judged, not 100: {text} has no more." in done.err


def test_by_default_as_many_tokens_as_the_model_can_take(turbomoe: Turbomoe, chat_model: Path) -> None:
    assert turbomoe("eval", "-m", chat_model, "--json", "--strict").json["results"][0]["tokens"] == CONTEXT


def no_codes(label: str, sink: int, recent: int, tokens: int) -> str:
    return (
        f"note: no position saw codes under {label}: the first {sink} and the last {recent} tokens stay exact, and "
        f"{tokens} tokens are judged. To avoid: judge more than {sink + recent + 1} tokens (--tokens N, or a longer "
        "--text)."
    )


def test_a_text_within_the_exact_windows_is_told_to_say_nothing(turbomoe: Turbomoe, chat_model: Path) -> None:
    """To the token: position 25 is the first that sees a code of windows 8/16."""
    run = ("eval", "-m", chat_model, "--json", "--kv", "tq2@8+16", "--kv", "bf16", "--kv", "tq3@0+0")
    for tokens, told in ((25, True), (26, False)):
        done = turbomoe(*run, "--tokens", tokens)
        assert (no_codes("tq2 8/16", 8, 16, tokens) in done.err.splitlines()) == told
        assert (done.json["results"][2]["mean_kl"] < 1e-7) == told, "what the note says is so"
        assert done.err.count("no position saw codes") == told
        assert done.json.get("no_position_saw_codes") == (["tq2 8/16"] if told else None)
    assert turbomoe(*run, "--tokens", 25, "--strict").code == cli.ERROR


def test_so_is_one_where_auto_took_bf16_for_that(turbomoe: Turbomoe, chat_model: Path, state_home: Path) -> None:
    done = turbomoe("eval", "-m", chat_model, "--tokens", 100)
    assert done.code == 0 and no_codes("auto", 64, 256, 100) in done.err.splitlines()
    for side in ("-ctk", "-ctv"):
        done = turbomoe("eval", "-m", chat_model, "--tokens", 100, side, "tq4")
        assert done.err.count("no position saw codes under ") == 1
    assert "no position" not in turbomoe("eval", "-m", chat_model, "--tokens", 100, "-ctk", "bf16", "-ctv", "bf16").err


BAD = {
    "missing text": (["--text", "/nowhere"], "Cannot read /nowhere. No such file or directory."),
    "one token": (["--tokens", "1"], "--tokens must be at least 2"),
    "a setting": (["--kv", "tq3@x"], "'tq3@x' is not a KV setting. Write K[/V]"),
    "a context": (["-c", "100"], "eval has no use for --ctx-size and --parallel. Say --tokens N"),
    "two sequences": (["-np", "2"], "eval has no use for --ctx-size and --parallel"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_before_anything_is_loaded(turbomoe: Turbomoe, name: str) -> None:
    flags, message = BAD[name]
    done = turbomoe("eval", "-m", "/no/model", *flags)
    assert done.code in (cli.ERROR, cli.USAGE) and done.out == "" and done.err.startswith(message)


def test_a_text_that_is_not_utf8(turbomoe: Turbomoe, tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_bytes(b"Stra\xdfe")
    done = turbomoe("eval", "-m", "/no/model", "--text", tmp_path / "old.txt")
    assert done.code == cli.ERROR and "old.txt is not UTF-8 text. Byte 4 is 0xdf" in done.err


@pytest.mark.parametrize("spec", ["tq9", "tq3/zip"])
def test_an_unknown_type_is_told_before_the_model_is_looked_for(turbomoe: Turbomoe, spec: str) -> None:
    done = turbomoe("eval", "-m", "/no/model", "--kv", spec)
    assert done.code == cli.USAGE and done.out == ""
    assert f"There is no KV cache type {spec.split('/')[-1]!r}" in done.err


@pytest.mark.parametrize("spec", ["auto", "tq3/AUTO"])
def test_auto_is_no_setting_to_name(turbomoe: Turbomoe, spec: str) -> None:
    done = turbomoe("eval", "-m", "/no/model", "--kv", spec)
    assert done.code == cli.USAGE and "Leave --kv out to judge what auto chooses" in done.err


def test_an_empty_text(turbomoe: Turbomoe, chat_model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    done = turbomoe("eval", "-m", chat_model, "--text", tmp_path / "empty.txt")
    assert done.code == cli.ERROR and "is too short to judge on. Give at least two tokens" in done.err


def test_more_tokens_than_the_model_was_trained_for_is_a_note(turbomoe: Turbomoe, chat_model: Path) -> None:
    flags = ("eval", "-m", chat_model, "--tokens", "600", "--json")
    done = turbomoe(*flags)
    assert done.code == 0 and "note: a context of 600 tokens: the model was trained for 512 tokens" in done.err
    assert turbomoe(*flags, "--strict").code == cli.ERROR


def test_a_file_without_a_tokenizer(turbomoe: Turbomoe, tmp_path: Path) -> None:
    path = write_chat_model(tmp_path / "bare.gguf", tokenizer=False)
    done = turbomoe("eval", "-m", path)
    assert done.code == cli.ERROR and "has no tokenizer and cannot read text" in done.err
