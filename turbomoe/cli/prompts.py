"""What a person types or pipes in: prompts, texts and the questions of a chat. Always UTF-8, or a clear error."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from turbomoe.config import state_dir
from turbomoe.errors import ModelError, RequestError
from turbomoe.notices import Notice, board

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings

    from turbomoe.models.base import LoadedModel

STDIN = "standard input"


def read_text(path: str | None) -> str:
    """A UTF-8 text file, or standard input for None. Raises ``RequestError`` naming the file and the place."""
    name = path or STDIN
    try:
        data = Path(path).read_bytes() if path else sys.stdin.buffer.read()
    except OSError as error:
        fix = "Check the path" if path else ""
        raise RequestError(f"Cannot read {name}", why=error.strerror or str(error), fix=fix) from error
    return decode(data, name).removeprefix("\ufeff")


def text_ids(model: LoadedModel, text: str) -> list[int]:
    """Plain text as the model's tokens. Raises ``ModelError`` for a model without a tokenizer."""
    from turbomoe.upstream.prompts import encode_text

    if model.tokenizer is None:
        raise ModelError(f"{model.name} has no tokenizer and cannot read text")
    return encode_text(model.tokenizer, text)


def decode(data: bytes, name: str, before: int = 0) -> str:
    """``data`` as text; ``before`` bytes of ``name`` came earlier. Raises ``RequestError`` naming the bad byte."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        why = f"Byte {before + error.start} is 0x{data[error.start]:02x} ({error.reason})"
        raise RequestError(f"{name} is not UTF-8 text", why=why, fix="Convert it, as with iconv -t utf-8") from error


def questions() -> Iterator[str]:
    """The questions of a chat, one at a time: typed at a terminal, else the lines of standard input."""
    if not sys.stdin.isatty():
        yield from piped_questions(sys.stdin.buffer)
        return
    ask = terminal_session().prompt
    while True:
        try:
            yield joined(ask)
        except KeyboardInterrupt:
            print("Ctrl-D or /exit leaves.", file=sys.stderr)
        except EOFError:
            return


def joined(ask: Callable[[str], str]) -> str:
    """One question, which goes on while its lines end with a backslash."""
    text = ask("> ")
    while text.endswith("\\"):
        text = text[:-1] + "\n" + ask(". ")
    return text


def piped_questions(lines: Iterable[bytes]) -> Iterator[str]:
    """A question a line; a backslash at its end goes on in the next."""
    at, begun = 0, ""
    for line in lines:
        begun += decode(line, STDIN, at).rstrip("\r\n")
        at += len(line)
        if begun.endswith("\\"):
            begun = begun[:-1] + "\n"
            continue
        yield begun
        begun = ""
    if begun:
        yield begun


def terminal_session() -> PromptSession[str]:
    """Line editing with a history, on standard error when standard output goes elsewhere."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.output import create_output

    output = create_output(always_prefer_tty=True)
    return PromptSession(history=_history(), key_bindings=_keys(), prompt_continuation=_continuation, output=output)


def _continuation(width: int, line: int, wraps: int) -> str:
    """What stands before a further line: a sign for one that was begun, nothing for one that only wrapped."""
    return "" if wraps else ". "


def _keys() -> KeyBindings:
    """Alt-Enter starts a new line (Enter alone sends)."""
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _history() -> History:
    """What was asked before, in a file that only its owner can read; in memory where it cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = state_dir() / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600))
    except OSError as error:
        why = f"{path} cannot be written ({error.strerror or error})"
        board.post(Notice("questions are forgotten at the end", why, avoid="set TURBOMOE_HOME to a writable folder"))
        return InMemoryHistory()
    return FileHistory(str(path))
