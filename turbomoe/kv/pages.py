"""Pages of coded tokens: who owns which page. Host bookkeeping here, page tables on the device for the kernels.

A page id means the same page in every layer. Page 0 is a scratch page that nobody owns: rows that have nothing
to store write there, so that every step has the same shape.
"""

from __future__ import annotations

import torch

from turbomoe.errors import ContextFullError, IntegrityError

PAGE_TOKENS = 64
SCRATCH_PAGE = 0


def pages_for(tokens: int) -> int:
    """Pages that hold ``tokens`` coded tokens."""
    return -(-max(0, tokens) // PAGE_TOKENS)


class PageAllocator:
    """Hands pages to sequence slots. ``table`` is int64 [slots, pages_per_slot] on the device, stable in address."""

    def __init__(self, slots: int, pages_per_slot: int, device: torch.device) -> None:
        self.pages_per_slot = pages_per_slot
        self.num_pages = 1 + slots * pages_per_slot
        self.table = torch.zeros(slots, max(1, pages_per_slot), dtype=torch.int64, device=device)
        self._free = list(range(self.num_pages - 1, 0, -1))
        self._owned: list[list[int]] = [[] for _ in range(slots)]

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def owned(self, slot: int) -> list[int]:
        """The pages of ``slot``, in order of position."""
        return list(self._owned[slot])

    def reserve(self, slot: int, pages: int) -> None:
        """Grow ``slot`` to at least ``pages`` pages. Raises ``ContextFullError``; then nothing has changed."""
        owned = self._owned[slot]
        missing = pages - len(owned)
        if missing <= 0:
            return
        if pages > self.pages_per_slot or missing > len(self._free):
            raise ContextFullError("The KV cache has no room for more tokens", fix="Use a larger --ctx-size")
        fresh = self._free[: -missing - 1 : -1]
        self.table[slot, len(owned) : pages] = torch.tensor(fresh, device=self.table.device)
        # In one statement: an interrupt must not leave a page to nobody, or to two.
        self._free, self._owned[slot] = self._free[:-missing], [*owned, *fresh]

    def release(self, slot: int) -> None:
        """Take back every page of ``slot``."""
        self._free, self._owned[slot] = [*self._free, *reversed(self._owned[slot])], []
        self.table[slot] = SCRATCH_PAGE

    def check_integrity(self) -> None:
        """Every page but the scratch page is free or owned once, and the device table says the same."""
        owned = [page for pages in self._owned for page in pages]
        if sorted(owned + self._free) != list(range(1, self.num_pages)):
            raise IntegrityError("A KV page is lost or owned twice")
        for slot, pages in enumerate(self._owned):
            if self.table[slot, : len(pages)].tolist() != pages:
                raise IntegrityError(f"The page table of slot {slot} differs from its pages")
