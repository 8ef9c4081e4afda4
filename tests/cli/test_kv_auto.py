"""``-ctk auto`` and ``-ctv auto``, the default: what a person and a program get to see, and how often it costs time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.cli.tiny_chat import Done, Turbomoe, write_chat_model
from turbomoe.cli import loading
from turbomoe.cli import main as cli
from turbomoe.config import EngineSettings
from turbomoe.hardware.memory import DeviceMemory
from turbomoe.insight import kv_auto
from turbomoe.insight.kv_record import record_path
from turbomoe.insight.kv_search import LADDER, Measured
from turbomoe.models import load_model

RUN = ("-p", "Why?", "-n", "20", "--temp", "0")  # 42 tokens, which is more than these windows hold
WINDOWS = ("--kv-sink", "4", "--kv-recent", "32")
CHECKING = (
    "checking which KV types this model bears, once for these settings, in a minute or more "
    "(-ctk tcq4 -ctv tcq4 needs no check)..."
)
MIB = 1 << 20


@pytest.fixture(autouse=True)
def own_state(state_home: Path) -> None:
    pass


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Types of Qwen2.5's kind: keys bear eight bits, values two. One entry a pass over the text."""
    passes: list[int] = []

    def judge(model, kv, means, ids, limits, progress=None, pause=None):
        passes.append(len(limits))
        return {pair: Measured(0.004 if pair[0] in ("bf16", "q8_0") else 0.36, 100, 100) for pair in limits}

    monkeypatch.setattr(kv_auto, "measure", judge)
    return passes


@pytest.fixture(scope="session")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("models") / "hybrid.gguf", family="qwen35")


NARROW = LADDER[-1]
LINE = (
    f"KV cache: keys q8_0, values {NARROW} (KL 0.004, budget 0.020, q8_0 0.004); "
    f"keys stay at q8_0: at {LADDER[1]} KL is 0.36"
)
TYPES = ("-ctk", NARROW, "-ctv", NARROW)
ROUNDS = [len(LADDER)] * 2  # all alike; then q8_0 with all that is narrower, and narrower keys


def test_checked_at_first_use_and_told_every_time(turbomoe: Turbomoe, hybrid: Path, judged: list[int]) -> None:
    first = turbomoe("run", "-m", hybrid, *RUN, *WINDOWS, "--strict")
    assert first.code == 0, first.err
    lines = first.err.splitlines()
    assert lines.index(CHECKING) < lines.index(LINE) and judged == ROUNDS
    assert any(line.startswith("kv is at most that, and ") for line in lines)
    again = turbomoe("run", "-m", hybrid, *RUN, *WINDOWS, "--strict")
    lines = again.err.splitlines()
    assert LINE in lines and CHECKING not in lines and "at most" not in again.err and judged == ROUNDS
    assert again.out == first.out


def test_the_real_check(turbomoe: Turbomoe, hybrid: Path) -> None:
    """Nothing replaced: text, tokenizer, windows, codes."""
    run = ("run", "-m", hybrid, *RUN, *WINDOWS, "--json")
    first, again = turbomoe(*run), turbomoe(*run)
    auto = first.json["kv_auto"]
    assert auto == again.json["kv_auto"] and CHECKING in first.err and CHECKING not in again.err
    assert (auto["type_k"], auto["type_v"]) == (first.json["kv_type_k"], first.json["kv_type_v"])
    assert 0 < auto["mean_kl"] <= auto["budget"] and auto["tokens"] == 512 - 37
    assert {(arm["k"], arm["v"]) for arm in auto["tried"]} >= {(name, name) for name in LADDER}


def test_a_log_hears_what_the_check_does(turbomoe: Turbomoe, hybrid: Path) -> None:
    """Standard error is no terminal here."""
    done = turbomoe("run", "-m", hybrid, *RUN, *WINDOWS)
    said = [line for line in done.err.splitlines() if line.startswith("checking")]
    pairs = 2 * len(LADDER) + 1
    assert said[:2] == [
        CHECKING,
        f"checking: 512 tokens under bf16 and at most {pairs} pairs of types, in at most 3 passes",
    ]
    assert said[2:] == [f"checking: pass {n} over 512 tokens is done" for n in range(1, len(said) - 1)]
    assert 1 <= len(said[2:]) <= 3
    again = turbomoe("run", "-m", hybrid, *RUN, *WINDOWS)
    assert "checking" not in again.err


def test_a_terminal_has_the_bar_alone(turbomoe: Turbomoe, hybrid: Path, judged, monkeypatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(loading.Bar, "__call__", lambda bar, done, total: opened.append(bar._what))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr(kv_auto, "measure", reporting(kv_auto.measure))
    done = turbomoe("run", "-m", hybrid, *RUN, *WINDOWS)
    assert CHECKING in done.err and "checking:" not in done.err and "checking" in opened


def reporting(judge):
    """``judge``, telling its progress as the real one does."""

    def measure(model, kv, means, ids, limits, progress=None, pause=None):
        progress(len(ids), len(ids))
        return judge(model, kv, means, ids, limits)

    return measure


def test_the_table_before_loading_counts_what_will_be_there(turbomoe: Turbomoe, hybrid: Path, judged) -> None:
    def kv(done: Done) -> str:
        """The third cell of the table's second line, unit included."""
        return " ".join(done.err.splitlines()[1].split()[3:5])

    run = ("run", "-m", hybrid, *RUN, *WINDOWS)
    first, again, given = turbomoe(*run), turbomoe(*run), turbomoe(*run, "-ctk", "q8_0", "-ctv", NARROW)
    exact = turbomoe(*run, "-ctk", "bf16", "-ctv", "bf16")
    assert kv(first) == kv(exact) != kv(again) == kv(given)


def test_given_types_load_nothing_of_this(turbomoe: Turbomoe, hybrid: Path, monkeypatch) -> None:
    """Off is off."""
    for name in [name for name in sys.modules if name.startswith("turbomoe.insight")]:
        monkeypatch.delitem(sys.modules, name)
    assert turbomoe("run", "-m", hybrid, *RUN, "-ctk", "bf16", "-ctv", "bf16").code == 0
    assert not [name for name in sys.modules if name.startswith("turbomoe.insight")]
    assert turbomoe("run", "-m", hybrid, *RUN, "-c", "64").code == 0
    assert "turbomoe.insight.kv_auto" in sys.modules, "the test looks at the right names"


def test_given_types_are_reported_without_a_choice(turbomoe: Turbomoe, hybrid: Path, judged: list[int]) -> None:
    report = turbomoe("run", "-m", hybrid, *RUN, "-ctk", "tq3", "-ctv", "tq2", "--json").json
    assert "kv_auto" not in report and (report["kv_type_k"], report["kv_type_v"]) == ("tq3", "tq2") and judged == []


def test_one_side_alone(turbomoe: Turbomoe, hybrid: Path, judged: list[int]) -> None:
    report = turbomoe("run", "-m", hybrid, *RUN, *WINDOWS, "-ctk", "bf16", "--json").json
    assert (report["kv_type_k"], report["kv_type_v"]) == ("bf16", NARROW) and judged == [len(LADDER) + 1]
    report = turbomoe("run", "-m", hybrid, *RUN, *WINDOWS, "-ctv", "bf16", "--json").json
    assert (report["kv_type_k"], report["kv_type_v"]) == ("q8_0", "bf16")


def test_a_budget_of_one_s_own(turbomoe: Turbomoe, hybrid: Path, judged: list[int]) -> None:
    run = ("run", "-m", hybrid, *RUN, *WINDOWS, "--json")
    assert turbomoe(*run, "--kv-budget", "0.5").json["kv_type_k"] == NARROW
    assert turbomoe(*run, "--kv-budget", "0.001").json["kv_auto"]["type_k"] == "bf16"
    assert turbomoe(*run, "--kv-budget", "0").code == cli.USAGE


def test_a_context_within_the_windows_is_bf16_and_nobody_hears_of_it(turbomoe, hybrid: Path, judged) -> None:
    done = turbomoe("run", "-m", hybrid, *RUN, "-c", "320", "--json")
    assert done.json["kv_type_k"] == done.json["kv_type_v"] == "bf16"
    assert done.json["kv_auto"]["why"] == "a context of at most 320 tokens lies in the exact windows"
    assert "KV cache" not in done.err and CHECKING not in done.err and "at most" not in done.err and judged == []


# A run so short that nothing is ever read from codes

SHORT = ("-p", "Why?", "-n", "14", "--temp", "0")  # the prompt has 22 tokens in the chat template
NO_CHECK = (
    "KV types are not checked: this takes at most 36 tokens, and 36 are exact under any type; the first that may be "
    "longer checks them"
)


def test_a_short_run_is_not_checked_and_says_when_it_will_be(turbomoe, hybrid: Path, judged, state_home) -> None:
    done = turbomoe("run", "-m", hybrid, *SHORT, *WINDOWS, "-c", "400", "--strict", "--json")
    assert done.json["kv_auto"]["why"] == "a context of at most 36 tokens lies in the exact windows"
    assert done.json["kv_type_k"] == done.json["kv_type_v"] == "bf16" and done.json["prompt_tokens"] == 22
    assert done.err.splitlines().count(NO_CHECK) == 1 and CHECKING not in done.err and "KV cache:" not in done.err
    assert judged == [] and not list(state_home.rglob("*.*")), "nothing is kept: neither a verdict nor means"
    longer = turbomoe("run", "-m", hybrid, *RUN, *WINDOWS)
    assert CHECKING in longer.err and LINE in longer.err and judged == ROUNDS


def test_what_was_checked_before_holds_for_short_runs_too(turbomoe: Turbomoe, hybrid: Path, judged) -> None:
    turbomoe("run", "-m", hybrid, *RUN, *WINDOWS)
    done = turbomoe("run", "-m", hybrid, *SHORT, *WINDOWS, "--json")
    assert done.json["kv_type_k"] == "q8_0" and LINE in done.err and "not checked" not in done.err


def test_a_short_run_says_what_any_types_would(turbomoe: Turbomoe, hybrid: Path) -> None:
    free, coded = (turbomoe("run", "-m", hybrid, *SHORT, *WINDOWS, *types) for types in ((), TYPES))
    assert NO_CHECK in free.err and free.out == coded.out and len(free.out) > 5


def test_one_token_more_is_checked(turbomoe: Turbomoe, hybrid: Path, judged, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text("Why?")
    run = ("run", "-m", hybrid, "-f", tmp_path / "prompt", *WINDOWS)
    assert NO_CHECK in turbomoe(*run, "-n", "14").err and judged == []
    assert LINE in turbomoe(*run, "-n", "15").err and judged == ROUNDS


@pytest.mark.parametrize("flags", [("-n", "0"), ("-n", "2", "--session", "a.session")], ids=["endless", "session"])
def test_where_the_length_is_not_known_it_is_checked(turbomoe, hybrid, judged, monkeypatch, tmp_path, flags) -> None:
    """A session may be gone on with in a chat, under the types of its first run."""
    monkeypatch.chdir(tmp_path)
    done = turbomoe("run", "-m", hybrid, "-p", "Why?", "--temp", "0", "-c", "60", *WINDOWS, *flags)
    assert done.code == 0 and LINE in done.err and judged == ROUNDS


def test_no_promise_of_a_check_that_cannot_be(turbomoe: Turbomoe, hybrid: Path, judged, monkeypatch) -> None:
    monkeypatch.setattr(kv_auto, "nothing_to_gain", lambda facts, settings: "no codec fits the heads of this model")
    done = turbomoe("run", "-m", hybrid, *SHORT, *WINDOWS)
    assert done.code == 0 and "checked" not in done.err and judged == []


def test_chat_reports_the_choice_too(turbomoe: Turbomoe, hybrid: Path, judged, monkeypatch) -> None:
    monkeypatch.setattr("turbomoe.cli.chat.questions", lambda: iter(["Why?"]))
    done = turbomoe("chat", "-m", hybrid, "-n", "2", "--temp", "0", *WINDOWS, "--json")
    assert done.json["kv_auto"]["type_k"] == done.json["kv_type_k"] == "q8_0" and LINE in done.err


def test_eval_judges_what_auto_chose(turbomoe: Turbomoe, hybrid: Path, judged: list[int]) -> None:
    run = ("eval", "-m", hybrid, "--tokens", "100", *WINDOWS, "--json")
    report = turbomoe(*run).json
    assert [r["label"] for r in report["results"]][2:] == [f"K q8_0 V {NARROW} 4/32"]
    assert report["kv_auto"]["type_k"] == "q8_0"
    judged.clear()
    report = turbomoe(*run, "--kv", "tq3", "--kv-recent", "48").json
    assert [r["label"] for r in report["results"]][2:] == ["tq3 64/256"] and "kv_auto" not in report and judged == []


def test_profile_runs_what_auto_chose(turbomoe: Turbomoe, tmp_path: Path, judged: list[int]) -> None:
    moe, text = write_chat_model(tmp_path / "moe.gguf", family="qwen35moe"), tmp_path / "text"
    text.write_text("It was a dark and stormy night. " * 20)
    done = turbomoe("profile", "-m", moe, "--text", text, "--tokens", "40", *WINDOWS)
    assert done.code == 0 and LINE in done.err and judged


def with_memory(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setattr("turbomoe.hardware.memory.devices", lambda: [DeviceMemory("cpu", 1 << 40, nbytes)])


def test_a_context_that_fits_in_codes_alone_is_not_refused(turbomoe, tmp_path: Path, monkeypatch, judged) -> None:
    """bf16 does not fit, the types that the model bears do; types that do not fit either are refused after all."""
    path = write_chat_model(tmp_path / "long.gguf", family="qwen35", more=lambda w: w.add_context_length(1 << 20))
    run = ("run", "-m", path, *RUN, *WINDOWS, "-c", str(1 << 18))
    with_memory(monkeypatch, 52 * MIB)
    assert turbomoe(*run, "-ctk", "bf16", "-ctv", "bf16").code == cli.ERROR and judged == []
    assert turbomoe(*run, "--json").json["kv_type_k"] == "q8_0"
    record_path(load_model(path, EngineSettings()).identity).unlink()
    for room, checked in ((20, True), (8, False)):  # the narrowest types take 14 MiB, the chosen ones 27
        with_memory(monkeypatch, room * MIB)
        done = turbomoe(*run)
        assert done.code == cli.ERROR and "This run needs" in done.err and (CHECKING in done.err) == checked


def test_the_model_s_own_limit_grows_with_codes(turbomoe: Turbomoe, tmp_path: Path, monkeypatch, judged) -> None:
    path = write_chat_model(tmp_path / "long.gguf", family="qwen35", more=lambda w: w.add_context_length(1 << 20))
    run = ("run", "-m", path, *RUN, *WINDOWS, "-c", "0")
    with_memory(monkeypatch, 64 * MIB)
    for _ in range(2):
        done = turbomoe(*run)
        assert done.code == 0 and "note: a context of 524288 tokens: the model's own limit" in done.err
    assert "note: a context of 131072" in turbomoe(*run, "-ctk", "bf16", "-ctv", "bf16").err
