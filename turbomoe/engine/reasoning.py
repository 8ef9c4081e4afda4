"""Tells a model's thinking apart from its answer while both are streamed."""

from __future__ import annotations

from turbomoe.engine.stops import StopMatcher

OPEN, CLOSE = "<think>", "</think>"


class ReasoningSplitter:
    """Feeds text through and marks each piece: (is_reasoning, text). The tags around a thought are not passed on.

    A thought stands in front of the answer or nowhere: a tag in the middle of an answer is what the answer says.
    ``thinking`` tells that the prompt already opened the thought, as templates of thinking models do.
    """

    def __init__(self, thinking: bool = False) -> None:
        self.thinking = thinking
        self._answering = False
        self._start = ""  # what was said so far, while it may still become an opening tag
        self._end = StopMatcher((CLOSE,))

    def push(self, text: str) -> list[tuple[bool, str]]:
        """The pieces that became certain with ``text``."""
        if not (self._answering or self.thinking):
            text = self._begin(text)
        pieces: list[tuple[bool, str]] = []
        if self.thinking:
            text = self._think(text, pieces)
        if text:
            pieces.append((False, text))
        return pieces

    def finish(self) -> list[tuple[bool, str]]:
        """What was held back as a possible tag."""
        held = self._end.finish() if self.thinking else self._start
        thinking, self._start = self.thinking, ""
        return [(thinking, held)] if held else []

    def _begin(self, text: str) -> str:
        """Decide between thought and answer; returns what follows the decision, nothing while it is open."""
        self._start += text
        said = self._start.lstrip()
        if OPEN.startswith(said) and said != OPEN:
            return ""
        self.thinking = said.startswith(OPEN)
        self._answering = not self.thinking
        text, self._start = said.removeprefix(OPEN) if self.thinking else self._start, ""
        return text

    def _think(self, text: str, pieces: list[tuple[bool, str]]) -> str:
        """Note the thought in ``text`` and return the answer behind it."""
        whole = self._end.held + text
        thought, ended = self._end.push(text)
        if thought:
            pieces.append((True, thought))
        if not ended:
            return ""
        self.thinking, self._answering = False, True
        return whole[len(thought) + len(CLOSE) :]
