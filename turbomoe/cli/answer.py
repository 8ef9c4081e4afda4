"""A streamed answer on the terminal: the answer on standard output, thoughts dimmed on standard error."""

from __future__ import annotations

import sys

DIM, PLAIN = "\x1b[2m", "\x1b[0m"


class AnswerWriter:
    """Streams an answer to standard output and thoughts to standard error, and keeps both.

    ``thinking`` tells that the prompt already opened a thought; without ``show`` the texts are only kept.
    """

    def __init__(self, thinking: bool, show: bool = True) -> None:
        from turbomoe.engine.reasoning import ReasoningSplitter

        self._splitter, self._show = ReasoningSplitter(thinking), show
        self._thought_open = False  # on the screen
        self.answer = self.reasoning = ""

    def write(self, text: str) -> None:
        """Take the next piece of what the model says."""
        self._put(self._splitter.push(text))

    def close(self) -> None:
        """Flush what was held back and end the line."""
        self._put(self._splitter.finish())
        self._end_thought()
        if self._show:
            print(flush=True)

    def _put(self, pieces: list[tuple[bool, str]]) -> None:
        for is_reasoning, text in pieces:
            if is_reasoning:
                self._put_thought(text)
            else:
                self._put_answer(text)

    def _put_thought(self, text: str) -> None:
        text = text if self.reasoning else text.lstrip("\n")
        if not text:
            return
        self.reasoning += text
        if self._show:
            print(text if self._thought_open else _style(DIM) + text, end="", flush=True, file=sys.stderr)
            self._thought_open = True

    def _put_answer(self, text: str) -> None:
        text = text if self.answer else text.lstrip("\n")
        self.answer += text
        self._end_thought()
        if self._show:
            print(text, end="", flush=True)

    def _end_thought(self) -> None:
        """A thought ends its line, so that an answer on the same terminal starts on its own."""
        if self._thought_open:
            print(_style(PLAIN) + ("" if self.reasoning.endswith("\n") else "\n"), flush=True, file=sys.stderr)
        self._thought_open = False


def _style(code: str) -> str:
    return code if sys.stderr.isatty() else ""
