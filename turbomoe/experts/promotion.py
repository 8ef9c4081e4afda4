"""Moving experts into slots, off the critical path: the protocol that makes a swap safe.

One step apart at least lie: (1) the victim is unmapped, (2) once its last reader is gone the copy starts, (3) once
the copy has landed its expert is mapped. Copies are polled and never waited for while serving. A copy that fails
or is cancelled gives its slot back; the store is only ever read, so truth is not at stake.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from turbomoe.errors import IntegrityError
from turbomoe.experts.residency import Move
from turbomoe.experts.slots import ExpertSlots
from turbomoe.notices import Notice, board


class CopyEngine(Protocol):
    """Copies blobs to the device in the background.

    ``start`` and ``done`` of a copy may raise: it has failed and no longer writes. Fences do not fail.
    """

    def start(self, dst: torch.Tensor, src: torch.Tensor) -> object:
        """Begin copying a host blob ``src`` over ``dst``; a token."""

    def fence(self) -> object:
        """A token that is done when all work submitted to the device so far has ended."""

    def done(self, token: object) -> bool:
        """Whether the copy or fence has ended. Never waits."""

    def wait(self, token: object) -> None:
        """Return when the copy or fence has ended, well or not. For loading only, never while serving."""


class ImmediateCopies:
    """Copies within ``start``, in order with the caller's own work: the engine of a host device."""

    def start(self, dst: torch.Tensor, src: torch.Tensor) -> object:
        with torch.inference_mode():
            dst.copy_(src)
        return None

    def fence(self) -> object:
        return None

    def done(self, token: object) -> bool:
        return True

    def wait(self, token: object) -> None:
        return None


@dataclass
class Retirement:
    """A slot that waits for its last reader, and the expert that will have it then (-1: it becomes free)."""

    position: int
    slot: int
    successor: int
    fence: object


@dataclass
class Transfer:
    """A copy under way. A cancelled one still writes, so its slot is freed only when it has ended."""

    position: int
    slot: int
    expert: int
    token: object
    cancelled: bool = False


class Promoter:
    """Carries out moves. One thread; every call but ``cancel`` lies between steps.

    ``started`` counts copies begun per layer position; ``failed``, ``cancelled`` and ``evicted`` count experts.
    ``in_flight`` bool [layers, experts] marks experts on their way into a slot.
    """

    def __init__(self, slots: ExpertSlots, engine: CopyEngine) -> None:
        self.slots, self.engine = slots, engine
        self.in_flight = np.zeros(slots.slot_of.shape, dtype=bool)
        self.started = np.zeros(len(slots.used), dtype=np.int64)
        self.failed = self.cancelled = self.evicted = 0
        self.transfers: list[Transfer] = []
        self.retirements: list[Retirement] = []
        self._errors: list[Exception] = []

    def apply(self, moves: Sequence[Move]) -> None:
        """Start ``moves``: into free slots at once, over victims by unmapping them first."""
        swaps = [move for move in moves if move.victim >= 0]
        for move in moves:
            self._refuse_double(move)
            if move.victim < 0:
                self._start(move.position, self.slots.take(move.position, move.expert), move.expert)
        fence = self.engine.fence() if swaps else None
        for move in swaps:
            self._retire(move.position, move.victim, move.expert, fence)
        self._report()

    def retire(self, victims: Sequence[tuple[int, int]]) -> None:
        """Give up the slots of ``victims`` (layer position, expert) without successors."""
        fence = self.engine.fence() if victims else None
        for position, expert in victims:
            self._retire(position, expert, -1, fence)

    def advance(self) -> None:
        """The boundary between two steps: map what has landed, publish, overwrite what nobody reads any more."""
        self._land()
        self.slots.publish()
        self._succeed()
        self._report()

    def drain(self) -> None:
        """Wait until nothing moves: for loading, when no step is running."""
        while self.retirements or self.transfers:
            for pending in self.retirements:
                self.engine.wait(pending.fence)
            for transfer in self.transfers:
                self.engine.wait(transfer.token)
            self.advance()
        self.slots.publish()

    def cancel(self, position: int, expert: int) -> bool:
        """Call off the promotion of ``expert``; False if none is under way. A victim already unmapped stays so."""
        for retirement in self.retirements:
            if (retirement.position, retirement.successor) == (position, expert):
                retirement.successor = -1
                self.in_flight[position, expert] = False
                self.cancelled += 1
                return True
        for transfer in self.transfers:
            if (transfer.position, transfer.expert) == (position, expert) and not transfer.cancelled:
                transfer.cancelled = True
                self.cancelled += 1
                return True
        return False

    def leaving(self) -> npt.NDArray[np.int64]:
        """Slots per layer position that will become free without a successor."""
        count = np.zeros_like(self.started)
        for retirement in self.retirements:
            count[retirement.position] += retirement.successor < 0
        return count

    def _refuse_double(self, move: Move) -> None:
        if self.in_flight[move.position, move.expert] or self.slots.slot_of[move.position, move.expert] >= 0:
            raise IntegrityError(f"Expert {move.expert} at layer position {move.position} was promoted twice")
        self.in_flight[move.position, move.expert] = True

    def _retire(self, position: int, victim: int, successor: int, fence: object) -> None:
        self.retirements.append(Retirement(position, self.slots.retire(position, victim), successor, fence))
        self.evicted += 1

    def _start(self, position: int, slot: int, expert: int) -> None:
        layer = self.slots.store.layers[position]
        try:
            token = self.engine.start(self.slots.blob(layer, slot), self.slots.store.blob(layer, expert))
        except Exception as error:  # whatever an engine raises, the slot must come back
            self._give_up(position, slot, expert, error)
            return
        self.started[position] += 1
        self.transfers.append(Transfer(position, slot, expert, token))

    def _land(self) -> None:
        waiting, self.transfers = self.transfers, []
        for transfer in waiting:
            try:
                ended = self.engine.done(transfer.token)
            except Exception as error:
                self._give_up(transfer.position, transfer.slot, transfer.expert, error)
                continue
            if not ended:
                self.transfers.append(transfer)
                continue
            self.in_flight[transfer.position, transfer.expert] = False
            settle = self.slots.release if transfer.cancelled else self.slots.make_ready
            settle(transfer.position, transfer.slot)

    def _succeed(self) -> None:
        waiting, self.retirements = self.retirements, []
        for pending in waiting:
            if not self.engine.done(pending.fence):
                self.retirements.append(pending)
            elif pending.successor < 0:
                self.slots.release(pending.position, pending.slot)
            else:
                self.slots.hand_over(pending.position, pending.slot, pending.successor)
                self._start(pending.position, pending.slot, pending.successor)

    def _give_up(self, position: int, slot: int, expert: int, error: Exception) -> None:
        self.slots.release(position, slot)
        self.in_flight[position, expert] = False
        self.failed += 1
        self._errors.append(error)

    def _report(self) -> None:
        errors, self._errors = self._errors, []
        for error in errors:
            cost = "it is computed from RAM as before"
            board.post(Notice("an expert was not copied to the device", f"{type(error).__name__}: {error}", cost))
