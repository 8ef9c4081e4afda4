"""The engine: requests in, events out. ``step`` is the whole of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from itertools import count

import torch

from turbomoe.config import EngineSettings
from turbomoe.engine.request import Event, Finish, Request, Usage
from turbomoe.engine.runner import ModelRunner, check_finite
from turbomoe.engine.sequence import Sequence
from turbomoe.engine.slots import SlotPool
from turbomoe.engine.threads import one_torch_thread, uses_workers
from turbomoe.errors import ContextFullError, RequestError
from turbomoe.experts.base import Phase
from turbomoe.kv.means import KVMeans
from turbomoe.models.base import LoadedModel

MAX_WAITING = 4096


class Engine:
    """Runs requests over a fixed number of sequence slots. One thread calls it; nothing here is shared or locked.

    Events come out of ``step`` for whoever serves all requests, or out of ``poll`` and ``stream`` for one of them;
    the two ways do not take each other's events. ``usage`` keeps the counts of the last few thousand requests.
    """

    def __init__(self, model: LoadedModel, settings: EngineSettings, means: KVMeans | None = None) -> None:
        self.model, self.settings = model, settings
        self.ctx_size = settings.ctx_size or model.context_length
        self.runner = ModelRunner(model, settings.kv, slots=settings.parallel, ctx_size=self.ctx_size, means=means)
        self._workers = uses_workers(model.shell)
        self.slots = SlotPool(self.runner.memory)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.usage: dict[int, Usage] = {}
        self._mail: dict[int, list[Event]] = {}
        self._ids = count(1)
        self._prefilled_last = False

    def submit(self, request: Request) -> int:
        """Queue a request and return its id. Raises ``RequestError`` for a prompt that cannot be run."""
        vocabulary = self.model.config.vocab_size
        if len(request.prompt) >= self.ctx_size:
            raise ContextFullError(
                f"The prompt has {len(request.prompt)} tokens and the context holds {self.ctx_size}",
                why="At least one token of the answer must fit as well",
                fix="Shorten the prompt or use a larger --ctx-size",
            )
        if not all(0 <= token < vocabulary for token in request.prompt):
            raise RequestError(f"The prompt has a token id outside the vocabulary of {vocabulary}")
        if len(self.waiting) >= MAX_WAITING:
            raise RequestError(f"{MAX_WAITING} requests are waiting already", fix="Try again when some have finished")
        sequence = Sequence(next(self._ids), request, self.model.tokenizer)
        self.usage[sequence.request_id] = sequence.usage
        if len(self.usage) > 2 * MAX_WAITING:
            del self.usage[next(iter(self.usage))]
        self.waiting.append(sequence)
        return sequence.request_id

    def step(self) -> list[Event]:
        """Admit who fits, run one prefill chunk or one decode batch, draw tokens, and report.

        What goes wrong in a pass ends the sequences it touched with an ``ERROR`` event; the others go on.
        """
        self._admit()
        batch, ids, phase = self._choose()
        if not batch:
            return []
        try:
            with one_torch_thread(self._workers and phase is Phase.DECODE):
                events = self._run(batch, ids, phase)
        except Exception as error:
            events = [Event(s.request_id, finish=Finish.ERROR, error=error) for s in batch]
            self._abandon(batch)
        except BaseException:
            self._abandon(batch)
            raise
        self._retire(events)
        for event in events:
            self._mail.get(event.request_id, []).append(event)
        return events

    def poll(self, request_id: int) -> list[Event]:
        """The events of one request that nobody has polled yet; runs a step if there are none.

        Raises what ended the request in an error, and ``RequestError`` for a request that is not running.
        """
        mail = self._mail.setdefault(request_id, [])
        if not mail and not any(s.request_id == request_id for s in (*self.waiting, *self.running)):
            del self._mail[request_id]
            raise RequestError(f"Request {request_id} is not running")
        if not mail:
            self.step()
        self._mail[request_id] = []
        if any(event.finish is not None for event in mail):
            del self._mail[request_id]
        for event in mail:
            if event.error is not None:
                raise event.error
        return mail

    def cancel(self, request_id: int) -> list[Event]:
        """Stop a request; its memory stays reusable. Unknown or finished ids give no event."""
        self._mail.pop(request_id, None)
        found = [s for s in (*self.waiting, *self.running) if s.request_id == request_id]
        events = [s.cancel() for s in found]
        self._drop_prompts(found)
        self.waiting = deque(s for s in self.waiting if s.request_id != request_id)
        self._retire(events)
        return events

    def stream(self, request: Request) -> Generator[Event, None, None]:
        """Submit one request and yield its events; closing the iterator early cancels it."""
        request_id, done = self.submit(request), False
        try:
            while not done:
                for event in self.poll(request_id):
                    done = event.finish is not None
                    yield event
        finally:
            self.cancel(request_id)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def find_lost_slots(self) -> None:
        """Take back slots that an interrupt left to nobody."""
        if len(self.slots) + len(self.running) < self.settings.parallel:
            self.slots.find_lost({s.slot for s in self.running})

    def _admit(self) -> None:
        self.find_lost_slots()
        while self.waiting and len(self.slots):
            sequence = self.waiting.popleft()
            sequence.slot, sequence.fed = self.slots.take(sequence.ids)
            sequence.usage.reused = sequence.fed
            self.running.append(sequence)

    def _choose(self) -> tuple[list[Sequence], torch.Tensor, Phase]:
        """The next batch. Prefill chunks and decode batches take turns, so neither starves the other."""
        prefilling = [s for s in self.running if s.prefilling]
        decoding = [s for s in self.running if not s.prefilling]
        self._prefilled_last = bool(prefilling) and not (self._prefilled_last and decoding)
        if self._prefilled_last:
            first = prefilling[0]
            chunk = first.ids[first.fed : first.fed + self.settings.prefill_chunk]
            return [first], torch.tensor([chunk]), Phase.PREFILL
        return decoding, torch.tensor([[s.ids[-1]] for s in decoding]), Phase.DECODE

    def _run(self, batch: list[Sequence], ids: torch.Tensor, phase: Phase) -> list[Event]:
        logits = self.runner.forward([s.slot for s in batch], ids, phase)[:, -1]
        for sequence in batch:
            sequence.fed += ids.shape[1]
        ready = [(s, row) for s, row in zip(batch, logits, strict=True) if not s.prefilling]
        if phase is Phase.PREFILL and ready and self.model.experts is not None:
            self.model.experts.end_prompt()
        return [self._advance(s, row) for s, row in ready]

    def _advance(self, sequence: Sequence, logits: torch.Tensor) -> Event:
        """Draw the next token of one sequence; an error here is its own."""
        try:
            check_finite(logits, self.model)
            token = sequence.sampler.draw(logits, sequence.ids)
            return sequence.accept(token, self.model.stop_ids, self.ctx_size)
        except Exception as error:
            self._abandon([sequence])
            return Event(sequence.request_id, finish=Finish.ERROR, error=error)

    def _retire(self, events: list[Event]) -> None:
        """Give back the slots of sequences whose event is the last one."""
        finished = {e.request_id for e in events if e.finish is not None}
        for sequence in [s for s in self.running if s.request_id in finished]:
            self.running.remove(sequence)
            self.slots.give_back(sequence.slot, sequence.ids[: sequence.fed])

    def _abandon(self, batch: list[Sequence]) -> None:
        """Something failed half-way: the memory of these sequences cannot be trusted any more."""
        self._drop_prompts(batch)
        for sequence in [s for s in batch if s in self.running]:
            self.running.remove(sequence)
            self.slots.forget(sequence.slot)

    def _drop_prompts(self, ended: list[Sequence]) -> None:
        """A prompt that is never finished must not seed the expert cache of the next one."""
        if self.model.experts is not None and any(s.prefilling for s in ended):
            self.model.experts.drop_prompt()
