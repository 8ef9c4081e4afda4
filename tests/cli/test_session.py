"""``--session``: taken up at the start, saved at the end whatever ended it, and never over something else."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.tiny_chat import Done, Says, Turbomoe
from turbomoe.cli import session
from turbomoe.engine.session import KIND, VERSION
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
            assert done.code == 1 and f"{path}: what is there is no session. Choose another name" in done.err
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


# Ctrl-C, in a process of its own


def interrupted(path: Path, file: Path, *verb: str, presses: int = 1) -> subprocess.CompletedProcess[str]:
    """Start an endless answer and press Ctrl-C in the middle of it."""
    command = [sys.executable, "-m", "turbomoe", *verb, "-m", str(path), *GREEDY, "--session", str(file)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=0
    )
    assert process.stdin and process.stdout and process.stderr
    process.stdin.write("Tell me!\n")
    if verb[0] == "run":
        process.stdin.close()
    assert process.stdout.read(1)
    for _ in range(presses):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    if verb[0] != "run":
        process.stdin.close()
    out, err = process.stdout.read(), process.stderr.read()
    return subprocess.CompletedProcess(command, process.wait(), out, err)


@pytest.mark.parametrize("verb,code", [("run", 130), ("chat", 0)])
def test_ctrl_c_ends_the_answer_and_keeps_it(turbomoe: Turbomoe, chat_model: Path, file: Path, verb, code) -> None:
    done = interrupted(chat_model, file, verb)
    assert done.returncode == code, done.stderr
    asked, answer = messages(file)
    assert asked.strip() == "Tell me!" and answer
    header, arrays = load_arrays(file, KIND, VERSION, 1 << 30)
    assert len(arrays["ids"]) >= len(arrays["seen_ids"]) - 1 > 10
    again = turbomoe("run", "-m", chat_model, "And?", "-n", "3", *GREEDY, "--session", file, "--json").json
    assert again["reused_tokens"] == len(arrays["ids"])
