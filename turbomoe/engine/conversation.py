"""A chat over the engine that pays only for what is new: each turn continues the memory of the last one."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from turbomoe.engine.engine import Engine
from turbomoe.engine.reasoning import OPEN
from turbomoe.engine.request import Event, Finish, Request, SamplingParams, Usage
from turbomoe.errors import ModelError
from turbomoe.notices import Notice, board
from turbomoe.upstream.prompts import encode_chat, encode_text, render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
READ_AGAIN = Notice(
    "earlier turns are read again",
    "the chat template writes them differently now (as those that drop old thoughts do)",
    "their tokens are computed again, as far as they are not counted as reused",
    expected=True,
)


@dataclass
class Turn:
    """One exchange on its way: what was asked, the prompt it became, and what came back so far."""

    messages: list[Message]
    prompt_text: str
    prompt: list[int]
    request_id: int = 0
    shown: str = ""
    drawn: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Transcript:
    """All of a conversation but its memory: what a session keeps beside the KV cache. ``kind`` is chat or text."""

    kind: str
    messages: list[Message]
    thinking: bool | None
    seen_ids: list[int]
    seen_text: str


class Conversation:
    """Messages so far, and the exact tokens that the model has seen for them.

    Templates render whole conversations. When a new rendering begins with the text the model has already seen,
    only the rest is tokenised and appended, so the tokens of old answers stay as they were drawn.
    """

    kind = "chat"

    def __init__(self, engine: Engine, *, system: str | None = None, thinking: bool | None = None) -> None:
        if engine.model.tokenizer is None:
            raise ModelError("This model has no tokenizer and cannot chat")
        if not engine.model.tokenizer.chat_template:
            fix = "Complete plain text with turbomoe run, or take the instruction-tuned version of the model"
            raise ModelError(f"{engine.model.name} has no chat template: it is a base model and cannot chat", fix=fix)
        self._begin(engine, engine.model.tokenizer, thinking)
        self.messages += [{"role": "system", "content": system}] if system else []

    def _begin(self, engine: Engine, tokenizer: PreTrainedTokenizerBase, thinking: bool | None) -> None:
        self.engine, self.tokenizer, self.thinking = engine, tokenizer, thinking
        self.messages: list[Message] = []
        self.usage = Usage()
        self.opens_thought = False  # whether the prompt of the last turn ended inside a thought
        self._seen_ids: list[int] = []
        self._seen_text = ""
        self._open: int | None = None  # the request under way
        self._asked: int | None = None  # the last request, unless it was given up
        self._stopped = False

    def ask(
        self, text: str, sampling: SamplingParams, max_tokens: int = 0, stop: tuple[str, ...] = ()
    ) -> Generator[Event, None, None]:
        """Stream the answer to ``text``. The turn is kept when it ends, also when cut short by closing the iterator.

        A turn that is cut short before the first token, or fails, is not kept. Raises ``ContextFullError`` when the
        conversation does not fit the context, ``RequestError`` for other refusals; then nothing has changed.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        turn = Turn(messages, *self._prompt(messages))
        request = Request(tuple(turn.prompt), max_tokens, sampling, stop)
        self.give_up()
        turn.request_id = self._open = self._asked = self.engine.submit(request)
        self.opens_thought = turn.prompt_text.rstrip().endswith(OPEN)
        self._stopped = False
        return self._answer(turn)

    def give_up(self) -> None:
        """End an answer that nobody reads any more: one never begun, or one whose end an interrupt broke off."""
        if self._asked is not None:
            self._close(self._asked)
            self._asked = None

    def stop(self) -> None:
        """End the running answer at the next token; it is kept as far as it came. May be called from a signal."""
        self._stopped = True

    def forget_oldest(self) -> bool:
        """Drop the oldest exchange (never the system message); False when there is none to drop."""
        first = 1 if self.messages and self.messages[0]["role"] == "system" else 0
        if len(self.messages) - first < 2:
            return False
        del self.messages[first : first + 2]
        self._forget_seen()
        return True

    def clear(self) -> None:
        """Start anew, keeping the system message."""
        self.messages = [m for m in self.messages if m["role"] == "system"]
        self._forget_seen()

    def retract(self) -> str | None:
        """Take back the last exchange and return what the user had asked."""
        if len(self.messages) < 2 or self.messages[-1]["role"] != "assistant":
            return None
        asked = self.messages[-2]["content"]
        del self.messages[-2:]
        self._forget_seen()
        return asked

    @property
    def busy(self) -> bool:
        """Whether an answer is on its way."""
        return self._open is not None

    def transcript(self) -> Transcript:
        """What has been said and seen so far."""
        messages = [dict(message) for message in self.messages]
        return Transcript(self.kind, messages, self.thinking, list(self._seen_ids), self._seen_text)

    def resume(self, transcript: Transcript) -> None:
        """Go on where ``transcript`` ended; a switch for thinking that was set here stays as it is."""
        self.messages = [dict(message) for message in transcript.messages]
        self.thinking = transcript.thinking if self.thinking is None else self.thinking
        self._seen_ids, self._seen_text = list(transcript.seen_ids), transcript.seen_text

    def _answer(self, turn: Turn) -> Generator[Event, None, None]:
        finish: Finish | None = None
        failed = False
        try:
            while finish is None:
                stopped, request_id = self._stopped, turn.request_id
                for event in self.engine.cancel(request_id) if stopped else self.engine.poll(request_id):
                    finish, turn.shown = event.finish, turn.shown + event.text
                    turn.drawn += [] if event.token is None else [event.token]
                    yield event
        except Exception:
            failed = True
            raise
        finally:
            try:
                turn.shown += self._close(turn.request_id)
            finally:  # also if an interrupt falls into it
                mine = self._asked == turn.request_id  # another turn has begun where it was given up
                if mine and not failed and (turn.drawn or finish is Finish.STOP):
                    self._keep(turn)

    def _close(self, request_id: int) -> str:
        """Make sure that a request has ended; returns the text that was still held back."""
        try:
            rest = "".join(event.text for event in self.engine.cancel(request_id))
            self.usage = self.engine.usage.pop(request_id, self.usage)
        finally:
            if self._open == request_id:
                self._open = None
        return rest

    def _keep(self, turn: Turn) -> None:
        said = self.tokenizer.decode(turn.drawn, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        seen = [*turn.prompt, *turn.drawn], turn.prompt_text + str(said)
        self._remember(turn)
        self._seen_ids, self._seen_text = seen  # together: an interrupt must not leave one without the other

    def _remember(self, turn: Turn) -> None:
        self.messages = [*turn.messages, {"role": "assistant", "content": turn.shown}]

    def _forget_seen(self) -> None:
        self._seen_ids, self._seen_text = [], ""

    def _prompt(self, messages: list[Message]) -> tuple[str, list[int]]:
        """The rendering of ``messages`` and its tokens."""
        text = render_chat(self.tokenizer, messages, thinking=self.thinking)
        rest = self._unseen(text, messages[-1]["content"])
        if rest is not None:
            ids: list[int] = self.tokenizer(rest, add_special_tokens=False)["input_ids"]
            return text, [*self._seen_ids, *ids]
        ids = encode_chat(self.tokenizer, messages, thinking=self.thinking)
        if ids[: len(self._seen_ids)] != self._seen_ids:
            board.post(READ_AGAIN)
        return text, ids

    def _unseen(self, text: str, question: str) -> str | None:
        """What ``text`` adds to what the model has seen; None where everything must be tokenised anew."""
        if not self._seen_ids or not self._is_plain(question):
            return None
        for seen in (self._seen_text, self._seen_text.rstrip()):  # many templates strip answers
            if text.startswith(seen):
                return text[len(seen) :]
        return None

    def _is_plain(self, text: str) -> bool:
        """Whether ``text`` holds no control tokens, which a user's words must not turn into."""
        return encode_text(self.tokenizer, text) == encode_text(self.tokenizer, text, allow_special=True)
