"""One running request: its tokens, how far they are in the memory, and what it still has to say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbomoe.engine.detokenizer import Detokenizer
from turbomoe.engine.request import Event, Finish, Request, Usage
from turbomoe.engine.sampling import Sampler
from turbomoe.engine.stops import StopMatcher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Sequence:
    """``ids`` are prompt and answer; ``fed`` of them are in the memory of ``slot``."""

    def __init__(self, request_id: int, request: Request, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.request_id, self.request = request_id, request
        self.ids = list(request.prompt)
        self.fed = 0
        self.slot = -1
        self.usage = Usage(prompt=len(request.prompt))
        self.sampler = Sampler(request.sampling)
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._stops = StopMatcher(request.stop)

    @property
    def prefilling(self) -> bool:
        """Whether more than the newest token is still to be fed."""
        return self.fed < len(self.request.prompt)

    def accept(self, token: int, stop_ids: frozenset[int], ctx_size: int) -> Event:
        """Take the drawn token and say what a reader sees of it."""
        self.ids.append(token)
        self.usage.generated += 1
        if token in stop_ids and not self.request.ignore_eos:
            return Event(self.request_id, self._rest(), None, Finish.STOP)
        text, stopped = self._stops.push(self._detokenizer.push(token) if self._detokenizer else "")
        if stopped:
            return Event(self.request_id, text, token, Finish.STOP)
        finish = self._limit(ctx_size)
        return Event(self.request_id, text + (self._rest() if finish else ""), token, finish)

    def cancel(self) -> Event:
        """The last event of a cancelled request."""
        return Event(self.request_id, self._rest(), None, Finish.CANCELLED)

    def _limit(self, ctx_size: int) -> Finish | None:
        if self.usage.generated == self.request.max_tokens:
            return Finish.LENGTH
        return Finish.CONTEXT if len(self.ids) >= ctx_size else None

    def _rest(self) -> str:
        text, stopped = self._stops.push(self._detokenizer.finish() if self._detokenizer else "")
        return text if stopped else text + self._stops.finish()
