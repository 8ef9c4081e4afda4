"""``--session``: taken up at the start, saved at the end whatever ended it, and never over something else."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cli.tiny_chat import Done, Says, Turbomoe
from turbomoe.cli import loading, session
from turbomoe.cli.answer import AnswerWriter
from turbomoe.engine.session import KIND, VERSION, session_types
from turbomoe.files.array_file import load_arrays, save_arrays

GREEDY = ("--temp", "0")
Talk = Callable[..., Done]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "kept" / "a.session"


@pytest.fixture
def talk(turbomoe: Turbomoe, says: Says, monkeypatch: pytest.MonkeyPatch, file: Path) -> Talk:
    """Pipe lines into ``turbomoe chat --session``."""

    def run(*lines: str, flags: tuple[object, ...] = ()) -> Done:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("".join(f"{x}\n" for x in lines).encode())))
        return turbomoe("chat", "-m", says.path, *GREEDY, "--session", file, *flags)

    return run


def messages(path: Path) -> list[str]:
    header, _ = load_arrays(path, KIND, VERSION, 1 << 30)
    return [message["content"] for message in header["messages"]]


def answers(done: Done) -> list[dict]:
    assert done.code == 0, done.err
    return [json.loads(line) for line in done.out.splitlines()]


# Chat


@pytest.mark.parametrize("kv", [(), ("-ctk", "tq3", "-ctv", "tq2")], ids=["bf16", "tq3-tq2"])
def test_a_chat_goes_on_in_another_process_as_in_the_same(talk: Talk, says: Says, file: Path, kv: tuple) -> None:
    says(*(2 * ["First.", "Second.", "Third."]))
    together = answers(talk("One?", "Two?", "Three?", flags=("--json", *kv)))
    file.unlink()
    apart = []
    for question in ("One?", "Two?", "Three?"):
        done = talk(question, flags=("--json", "-c", 200 + len(apart), *kv))
        assert (f"Going on with {file}.\n" in done.err) == bool(apart)
        apart += answers(done)
    for same in ("text", "finish", "prompt_tokens", "reused_tokens", "generated_tokens"):
        assert [turn[same] for turn in apart] == [turn[same] for turn in together]
    assert apart[2]["reused_tokens"] > apart[0]["prompt_tokens"]
    assert messages(file) == ["One?", "First.", "Two?", "Second.", "Three?", "Third."]


def test_it_is_saved_after_every_answer_while_that_is_cheap(talk: Talk, says: Says, file: Path, monkeypatch) -> None:
    seen = []
    original = session.SessionFile.answered
    monkeypatch.setattr(
        session.SessionFile, "answered", lambda self: [original(self), seen.append(file.exists() and messages(file))]
    )
    says("First.", "Second.")
    talk("One?", "Two?")
    assert seen == [["One?", "First."], ["One?", "First.", "Two?", "Second."]]


def test_what_is_not_cheap_is_saved_at_the_end(talk: Talk, says: Says, file: Path, monkeypatch) -> None:
    monkeypatch.setattr(session, "CHEAP", 100)
    saves = []
    original = session.SessionFile.save
    monkeypatch.setattr(session.SessionFile, "save", lambda self: [saves.append(1), original(self)])
    says("First.", "Second.")
    done = talk("One?", "Two?", flags=("--strict",))
    assert done.code == 0 and len(saves) == 1
    assert done.err.count("note: the session is saved at the end only: it holds more than 100 B.") == 1
    assert messages(file) == ["One?", "First.", "Two?", "Second."]


def test_a_disk_that_is_full_for_a_while_does_not_end_the_chat(talk: Talk, says: Says, file: Path, monkeypatch) -> None:
    replace, calls = os.replace, []

    def full_at_first(*names: object) -> None:
        calls.append(names)
        if len(calls) == 1:
            raise OSError(28, "no space left")
        replace(*names)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", full_at_first)
    says("First.", "Second.")
    done = talk("One?", "Two?")
    assert (done.code, done.out) == (0, "First.\nSecond.\n")
    assert "note: the session is not saved yet: Cannot write" in done.err and "no space left" in done.err
    assert len(calls) == 2 and messages(file) == ["One?", "First.", "Two?", "Second."]


def test_a_disk_that_stays_full_is_an_error_at_the_end(talk: Talk, says: Says, file: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "no space left")))
    says("First.")
    done = talk("One?")
    assert (done.code, done.out) == (1, "First.\n") and not file.exists() and os.listdir(file.parent) == []


def test_nothing_said_is_nothing_saved(talk: Talk, says: Says, file: Path) -> None:
    assert talk("/help").code == 0 and not file.parent.exists()
    says("First.")
    talk("One?")
    before = file.stat().st_mtime_ns, file.stat().st_ino
    talk("/stats")
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == before


def test_commands_are_saved_too(talk: Talk, says: Says, file: Path) -> None:
    says("First.", "Second.")
    talk("One?", "Two?")
    talk("/drop")
    assert messages(file) == ["Two?", "Second."]
    talk("/clear")
    assert messages(file) == [] and b"Two?" not in file.read_bytes()


def test_a_session_keeps_its_system_message(talk: Talk, says: Says, file: Path) -> None:
    says("First.", "Second.")
    talk("One?", flags=("--system", "Be brief."))
    talk("Two?")
    assert messages(file) == ["Be brief.", "One?", "First.", "Two?", "Second."]
    assert talk("/help", flags=("--system", "Be brief.")).code == 0
    done = talk("Three?", flags=("--system", "Be long."))
    assert done.code == 2 and "has another system message. Leave --system out" in done.err
    assert messages(file) == ["Be brief.", "One?", "First.", "Two?", "Second."]


def test_an_error_in_the_middle_keeps_what_was_said(talk: Talk, says: Says, file: Path, monkeypatch) -> None:
    monkeypatch.setattr(session, "CHEAP", -1)
    says("First.")  # and no second answer
    done = talk("One?", "Two?")
    assert done.code == 1 and messages(file) == ["One?", "First."]


# Run


def test_run_is_a_turn_of_the_same_conversation(turbomoe: Turbomoe, talk: Talk, says: Says, file: Path) -> None:
    says("First.", "Second.", "Third, and more.")
    one = turbomoe("run", "-m", says.path, "One?", *GREEDY, "--session", file, "--json").json
    talk("Two?")
    three = turbomoe("run", "-m", says.path, "Three?", *GREEDY, "--session", file, "--json", "--stop", ", and").json
    assert (one["reused_tokens"], three["text"], three["finish"]) == (0, "Third", "stop")
    assert three["reused_tokens"] > one["prompt_tokens"]
    assert messages(file) == ["One?", "First.", "Two?", "Second.", "Three?", "Third"]


def test_run_raw_writes_on(turbomoe: Turbomoe, says: Says, file: Path) -> None:
    says(" a time", " was")
    for prompt in ("Once upon", " there"):
        turbomoe("run", "-m", says.path, "--raw", prompt, *GREEDY, "--session", file)
    header, _ = load_arrays(file, KIND, VERSION, 1 << 30)
    assert header["seen_text"] == "Once upon a time there was" and header["messages"] == []
    done = turbomoe("run", "-m", says.path, "One?", *GREEDY, "--session", file)
    assert done.code == 1 and "holds plain text, not a chat" in done.err and done.out == ""


def test_a_base_model_writes_on_too(turbomoe: Turbomoe, says: Says, file: Path) -> None:
    says.template(None)
    says(" a time")
    done = turbomoe("run", "-m", says.path, "Once upon", *GREEDY, "--session", file)
    assert done.code == 0 and "note: the prompt is completed as plain text" in done.err
    assert load_arrays(file, KIND, VERSION, 1 << 30)[0]["kind"] == "text"


# Refusing


def test_what_cannot_be_a_session_is_refused_before_a_model_is_loaded(
    turbomoe: Turbomoe, says: Says, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turbomoe.models.load_model", lambda *_, **__: pytest.fail("loaded"))
    thesis, pipe = tmp_path / "thesis", tmp_path / "pipe"
    thesis.write_text("Chapter 1")
    os.mkfifo(pipe)
    profile = tmp_path / "profile"
    save_arrays(profile, "turbomoe-profile", 1, {}, {})
    for path in (thesis, pipe, tmp_path, profile, Path("/dev/null")):
        for verb in (("run", "One?"), ("chat",)):
            done = turbomoe(*verb, "-m", says.path, "--session", path)
            assert done.code == 1 and f"{path} as session: what is there is no session. Choose another name" in done.err
    assert thesis.read_text() == "Chapter 1" and pipe.is_fifo()
    below = turbomoe("run", "One?", "-m", says.path, "--session", thesis / "below")
    assert below.code == 2 and f"{thesis} is no folder that can be written" in below.err


def test_a_session_that_does_not_fit_is_refused_before_a_token(talk: Talk, says: Says, file: Path) -> None:
    says("First.")
    talk("One?")
    before = file.read_bytes()
    for flags, match in (
        (("-ctk", "tq3"), "Use -ctk bf16 -ctv bf16"),
        (("-c", "20"), "and this context 20. Use -c"),
    ):
        done = talk("Two?", flags=flags)
        assert done.code == 1 and match in done.err and done.out == ""
    file.write_bytes(before[:-1])
    done = talk("Two?")
    assert done.code == 1 and "damaged" in done.err and "delete this one to start anew" in done.err
    assert file.read_bytes() == before[:-1]


def test_a_session_of_another_model_is_refused_before_the_model_is_read(
    talk: Talk, says: Says, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says("First.")
    talk("One?")
    before = file.read_bytes()
    read: list[str] = []
    monkeypatch.setattr(loading, "announce", lambda *_, **__: read.append("announced"))
    says.model = replace(says.model, identity="another")
    done = talk("Two?")
    assert done.code == 1 and f"Cannot use {file} as session: it belongs to another model, scripted" in done.err
    assert not read and file.read_bytes() == before


def test_auto_takes_the_types_of_the_session(talk: Talk, says: Says, file: Path) -> None:
    says("First.", "Second.", "Third.")
    talk("One?", flags=("-ctk", "tq3", "-ctv", "tq2"))
    done = talk("Two?", flags=("--json", "-ctk", "auto", "-ctv", "auto"))
    (turn,) = answers(done)
    assert (turn["kv_type_k"], turn["kv_type_v"]) == ("tq3", "tq2") and turn["reused_tokens"] > 0


@pytest.mark.parametrize("damage", [b"", b"\x00" * 64, b"{}", b"\xff" * 9])
def test_types_are_not_read_from_what_is_no_session(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "x").write_bytes(damage)
    assert session_types(tmp_path / "x") is None and session_types(tmp_path / "none") is None


# Ctrl-C


@pytest.fixture
def presses(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Press Ctrl-C so many times when the fourth piece of an answer is written."""

    def press(times: int) -> None:
        write, pieces = AnswerWriter.write, []

        def pressing(self: AnswerWriter, text: str) -> None:
            write(self, text)
            pieces.append(text)
            for _ in range(times if len(pieces) == 4 else 0):
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(AnswerWriter, "write", pressing)

    return press


LONG = "A long answer that nobody wants to hear to its end."


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("kv", [(), ("-ctk", "tq3", "-ctv", "tq2")], ids=["bf16", "tq3-tq2"])
@pytest.mark.parametrize("verb", ["run", "chat"])
def test_ctrl_c_keeps_what_was_said(
    turbomoe: Turbomoe, talk: Talk, says: Says, file: Path, presses: Callable[[int], None], verb: str, times: int,
    kv: tuple,
) -> None:  # fmt: skip
    """A second press, between two steps, breaks off the writing but not what was kept."""
    says(LONG, "Fine.")
    presses(times)
    flags = (*GREEDY, "--session", file, "--json", *kv)
    done = turbomoe("run", "-m", says.path, "One?", *flags) if verb == "run" else talk("One?", flags=flags)
    assert done.code == (130 if verb == "run" else 0), done.err
    asked, answer = messages(file)
    assert asked == "One?" and LONG.startswith(answer) and 0 < len(answer) < len(LONG)
    _, arrays = load_arrays(file, KIND, VERSION, 1 << 30)
    again = turbomoe("run", "-m", says.path, "Two?", *flags).json
    assert again["text"] == "Fine." and again["reused_tokens"] == len(arrays["ids"]) >= len(arrays["seen_ids"]) - 1


def test_a_step_that_is_broken_off_costs_the_cache_and_says_so(talk: Talk, says: Says, file: Path) -> None:
    says("First.", LONG, "Third.")
    talk("One?")
    calls, shell = [], says.model.shell
    forward = type(shell).forward

    def interrupted(self: object, **given: object) -> object:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(self, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(shell), "forward", interrupted)
        done = talk("Two?")
    assert "note: the session is saved without its cache: a step was broken off." in done.err
    asked = messages(file)
    assert asked[:3] == ["One?", "First.", "Two?"] and LONG.startswith(asked[3])
    (turn,) = answers(talk("Three?", flags=("--json",)))
    assert (turn["text"], turn["reused_tokens"]) == ("Third.", 0)
