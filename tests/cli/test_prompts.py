"""Questions as people type and pipe them: several lines, a history, text that is not UTF-8."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from turbomoe.cli import prompts
from turbomoe.errors import RequestError
from turbomoe.notices import board

PIPED = {
    b"one\ntwo\n": ["one", "two"],
    b"one": ["one"],
    b"one\\\ntwo\nthree": ["one\ntwo", "three"],
    b"one\\\n\\\ntwo": ["one\n\ntwo"],
    b"one\r\ntwo\\\r\nthree": ["one", "two\nthree"],
    b"one\\": ["one\n"],
    b"\n\n": ["", ""],
    b"": [],
    "Grüße 🙂\n".encode(): ["Grüße 🙂"],
}


@pytest.mark.parametrize(("data", "expected"), PIPED.items())
def test_a_question_a_line_and_a_backslash_goes_on(data: bytes, expected: list[str]) -> None:
    assert list(prompts.piped_questions(data.splitlines(keepends=True))) == expected


@given(st.lists(st.text(st.characters(exclude_characters="\r\n\\", codec="utf-8")), max_size=8))
def test_lines_come_as_they_are(lines: list[str]) -> None:
    assert list(prompts.piped_questions(f"{line}\n".encode() for line in lines)) == lines


def test_a_line_that_is_not_utf8_names_the_byte_of_the_whole_input() -> None:
    asked = prompts.piped_questions([b"good\n", b"Stra\xdfe\n"])
    assert next(asked) == "good"
    with pytest.raises(RequestError, match=r"standard input is not UTF-8 text. Byte 9 is 0xdf"):
        next(asked)


def test_typed_lines_are_joined_while_they_end_with_a_backslash() -> None:
    typed = iter(["one\\", "two\\", "three"])
    signs = []
    assert prompts.joined(lambda sign: signs.append(sign) or next(typed)) == "one\ntwo\nthree"
    assert signs == ["> ", ". ", ". "]


def type_in(keys: str, sessions: int = 1) -> list[str]:
    """What a terminal session makes of ``keys``, one question a session."""
    with create_pipe_input() as keyboard, create_app_session(input=keyboard, output=DummyOutput()):
        keyboard.send_text(keys)
        return [prompts.terminal_session().prompt("> ") for _ in range(sessions)]


@pytest.fixture
def dummy_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prompt_toolkit.output.create_output", lambda **_: DummyOutput())


def test_a_line_that_was_begun_has_a_sign_and_one_that_wrapped_has_none() -> None:
    assert [prompts._continuation(2, line, wraps) for line, wraps in ((1, 0), (1, 1), (2, 0))] == [". ", "", ". "]


ALT_ENTER, UP = "\x1b\r", "\x1b[A"


@pytest.mark.usefixtures("dummy_output")
def test_alt_enter_starts_a_line_and_enter_sends(state_home: Path) -> None:
    assert type_in(f"one{ALT_ENTER}two\r") == ["one\ntwo"]


@pytest.mark.usefixtures("dummy_output")
def test_questions_are_remembered_from_one_session_to_the_next(state_home: Path) -> None:
    assert type_in(f"one{ALT_ENTER}more\r") == ["one\nmore"]
    assert type_in(f"{UP}{UP}\r") == ["one\nmore"]
    path = state_home / "chat_history"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.usefixtures("dummy_output")
def test_a_history_that_cannot_be_kept_is_a_note(state_home: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(board, "strict", False)
    state_home.write_text("a file where the folder should be")
    assert type_in("one\r") == ["one"]
    assert "note: questions are forgotten at the end" in capsys.readouterr().err
