"""A chat over the engine that pays only for what is new: each turn continues the memory of the last one."""

from __future__ import annotations

from collections.abc import Generator

from turbomoe.engine.engine import Engine
from turbomoe.engine.reasoning import OPEN
from turbomoe.engine.request import Event, Request, SamplingParams, Usage
from turbomoe.errors import ModelError
from turbomoe.upstream.prompts import encode_chat, encode_text, render_chat

Message = dict[str, str]


class Conversation:
    """Messages so far, and the exact tokens that the model has seen for them.

    Templates render whole conversations. When a new rendering begins with the text the model has already seen,
    only the rest is tokenised and appended, so the tokens of old answers stay as they were drawn.
    """

    def __init__(self, engine: Engine, *, system: str | None = None, thinking: bool | None = None) -> None:
        if engine.model.tokenizer is None:
            raise ModelError("This model has no tokenizer and cannot chat")
        self.engine, self.tokenizer = engine, engine.model.tokenizer
        self.thinking = thinking
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self.usage = Usage()
        self.opens_thought = False  # whether the prompt of the last turn ended inside a thought
        self._seen_ids: list[int] = []
        self._seen_text = ""

    def ask(self, text: str, sampling: SamplingParams, max_tokens: int = 0) -> Generator[Event, None, None]:
        """Stream the answer to ``text``. The turn is kept when it ends, also when cut short by closing the iterator.

        Raises ``RequestError`` when the conversation does not fit the context; then nothing has changed.
        """
        turn = [*self.messages, {"role": "user", "content": text}]
        prompt_text, prompt = self._prompt(turn)
        request = Request(tuple(prompt), max_tokens=max_tokens, sampling=sampling)
        return self._answer(self.engine.submit(request), turn, prompt_text, request)

    def forget_oldest(self) -> bool:
        """Drop the oldest exchange (never the system message); False when there is none to drop."""
        first = 1 if self.messages and self.messages[0]["role"] == "system" else 0
        if len(self.messages) - first < 2:
            return False
        del self.messages[first : first + 2]
        return True

    def clear(self) -> None:
        """Start anew, keeping the system message."""
        self.messages = [m for m in self.messages if m["role"] == "system"]

    def retract(self) -> str | None:
        """Take back the last exchange and return what the user had asked."""
        if len(self.messages) < 2 or self.messages[-1]["role"] != "assistant":
            return None
        asked = self.messages[-2]["content"]
        del self.messages[-2:]
        return asked

    def _answer(
        self, request_id: int, turn: list[Message], prompt_text: str, request: Request
    ) -> Generator[Event, None, None]:
        shown, drawn, finish = "", list[int](), None
        try:
            while finish is None:
                for event in self.engine.step():
                    shown, finish = shown + event.text, event.finish
                    drawn += [] if event.token is None else [event.token]
                    yield event
        finally:
            for event in self.engine.cancel(request_id):
                shown += event.text
            self.usage = self.engine.usage.pop(request_id)
            self._keep(turn, prompt_text, request, shown, drawn)

    def _keep(self, turn: list[Message], prompt_text: str, request: Request, shown: str, drawn: list[int]) -> None:
        self.messages = [*turn, {"role": "assistant", "content": shown}]
        self._seen_ids = [*request.prompt, *drawn]
        self._seen_text = prompt_text + str(self.tokenizer.decode(drawn, skip_special_tokens=False))

    def _prompt(self, turn: list[Message]) -> tuple[str, list[int]]:
        """The rendering of ``turn`` and its tokens."""
        text = render_chat(self.tokenizer, turn, thinking=self.thinking)
        self.opens_thought = text.rstrip().endswith(OPEN)
        if self._seen_text and text.startswith(self._seen_text) and self._is_plain(turn[-1]["content"]):
            rest = self.tokenizer(text[len(self._seen_text) :], add_special_tokens=False)["input_ids"]
            return text, [*self._seen_ids, *rest]
        return text, encode_chat(self.tokenizer, turn, thinking=self.thinking)

    def _is_plain(self, text: str) -> bool:
        """Whether ``text`` holds no control tokens, which a user's words must not turn into."""
        return encode_text(self.tokenizer, text) == encode_text(self.tokenizer, text, allow_special=True)
