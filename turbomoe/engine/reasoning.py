"""Tells a model's thinking apart from its answer while both are streamed."""

from __future__ import annotations

from turbomoe.engine.stops import StopMatcher

OPEN, CLOSE = "<think>", "</think>"


class ReasoningSplitter:
    """Feeds text through and marks each piece: (is_reasoning, text). Tags themselves are not passed on.

    ``thinking`` says that the prompt already opened a thought, as templates of thinking models do.
    """

    def __init__(self, thinking: bool = False) -> None:
        self.thinking = thinking
        self._tag = StopMatcher((self._awaited,))

    @property
    def _awaited(self) -> str:
        return CLOSE if self.thinking else OPEN

    def push(self, text: str) -> list[tuple[bool, str]]:
        """The pieces that became certain with ``text``."""
        pieces: list[tuple[bool, str]] = []
        while True:
            whole = self._tag.held + text
            shown, met = self._tag.push(text)
            self._note(pieces, shown)
            if not met:
                return pieces
            text = whole[len(shown) + len(self._awaited) :]
            self.thinking = not self.thinking
            self._tag = StopMatcher((self._awaited,))

    def finish(self) -> list[tuple[bool, str]]:
        """What was held back as a possible tag."""
        pieces: list[tuple[bool, str]] = []
        self._note(pieces, self._tag.finish())
        return pieces

    def _note(self, pieces: list[tuple[bool, str]], text: str) -> None:
        if text:
            pieces.append((self.thinking, text))
