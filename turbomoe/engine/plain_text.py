"""A text that a model goes on writing, turn by turn: a conversation without roles, messages or a template."""

from __future__ import annotations

from turbomoe.engine.conversation import Conversation, Message, Turn
from turbomoe.engine.engine import Engine
from turbomoe.errors import ModelError
from turbomoe.upstream.prompts import encode_more, encode_text


class PlainText(Conversation):
    """What is asked goes on where the text ended, and the answer goes on from there. ``messages`` stay empty."""

    kind = "text"

    def __init__(self, engine: Engine) -> None:
        if engine.model.tokenizer is None:
            raise ModelError(f"{engine.model.name} has no tokenizer and cannot read text")
        self._begin(engine, engine.model.tokenizer, None)

    def _prompt(self, messages: list[Message]) -> tuple[str, list[int]]:
        text = messages[-1]["content"]
        if not self._seen_ids:
            return text, encode_text(self.tokenizer, text)
        return self._seen_text + text, [*self._seen_ids, *encode_more(self.tokenizer, text)]

    def _remember(self, turn: Turn) -> None:
        """The text itself is all there is."""
