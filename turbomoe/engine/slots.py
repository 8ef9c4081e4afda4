"""Sequence slots and what they still remember: a finished conversation stays until its room is needed."""

from __future__ import annotations

from collections.abc import Container, Sequence

from turbomoe.errors import RequestError
from turbomoe.kv.cache import KVCache


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


class SlotPool:
    """Free slots with the tokens their memory holds. A slot is lent to one sequence at a time."""

    def __init__(self, memory: KVCache) -> None:
        self.memory = memory
        self._idle: dict[int, list[int]] = {slot: [] for slot in range(len(memory.host_lengths))}  # oldest first

    def __len__(self) -> int:
        return len(self._idle)

    def take(self, prompt: Sequence[int]) -> tuple[int, int]:
        """Lend the slot that knows most of ``prompt``: (slot, tokens of the prompt already in its memory).

        At least one prompt token is left to run, for its logits. Memory that does not fit the prompt is dropped.
        """
        slot = max(self._idle, key=lambda s: (self._reusable(self._idle[s], prompt), not self._idle[s]))
        known = self._reusable(self._idle[slot], prompt)
        if known == 0 or known < self.memory.host_lengths[slot]:
            self._idle[slot] = []  # should this be broken off, it knows nothing and is wiped when it is taken again
            if known == 0:
                self.memory.release(slot)
            else:
                self.memory.truncate(slot, known)
        del self._idle[slot]
        return slot, known

    def give_back(self, slot: int, ids: Sequence[int]) -> None:
        """Return a slot whose memory holds ``ids``; if it does not (a step was interrupted), nothing is kept."""
        if self.memory.host_lengths[slot] != len(ids):
            self.forget(slot)
            return
        self._idle[slot] = list(ids)

    def forget(self, slot: int) -> None:
        """Return a slot and drop its memory."""
        self._idle[slot] = []  # first: what breaks off a release must not lose the slot
        self.memory.release(slot)

    def find_lost(self, lent: Container[int]) -> None:
        """Take back slots that nobody has: an interrupt may fall between any two lines of giving and taking."""
        for slot in range(len(self.memory.host_lengths)):
            if slot not in self._idle and slot not in lent:
                self.forget(slot)

    def known(self, slot: int) -> list[int]:
        """The tokens that the memory of an idle slot holds. Raises ``RequestError`` for any other number."""
        if slot not in self._idle:
            raise RequestError(f"Slot {slot} is running a request or does not exist", fix="Wait for its end")
        return list(self._idle[slot])

    def knowing(self, ids: Sequence[int]) -> int | None:
        """The idle slot that knows most of ``ids`` and nothing that departs from them; None where there is none.

        A memory that departs is another conversation's, behind the same system message.
        """
        alike = {slot: common_prefix(known, ids) for slot, known in self._idle.items()}
        mine = [slot for slot, same in alike.items() if 0 < same == min(len(self._idle[slot]), len(ids))]
        return max(mine, key=alike.__getitem__, default=None)

    def spare(self) -> int:
        """The idle slot with the least to lose: an empty one, else the oldest. Raises ``RequestError`` without any."""
        if not self._idle:
            raise RequestError(
                "Every sequence slot is running a request", fix="Wait for one to end, or raise --parallel"
            )
        return min(self._idle, key=lambda s: bool(self._idle[s]))

    def replace(self, slot: int, ids: Sequence[int]) -> None:
        """The memory of an idle slot has been replaced by one that holds ``ids``: it is now the newest."""
        del self._idle[slot]
        self.give_back(slot, ids)

    def _reusable(self, known: Sequence[int], prompt: Sequence[int]) -> int:
        same = min(common_prefix(known, prompt), len(prompt) - 1)
        return same if same == len(known) or self.memory.can_truncate else 0
