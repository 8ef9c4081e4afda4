"""What one attention layer remembers of every sequence slot: exact sinks, an exact ring, and pages of codes.

The rule, whatever the chunking: the query at position t sees positions below ``sink`` and t-recent..t exactly,
and everything between from codes. So a token is encoded when it leaves the ring, and a chunk longer than the
ring encodes its own early tokens before its late queries look at them.
A sliding-window layer is the same thing without sinks and codes, its ring as long as the window.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch

from turbomoe.kv.base import Codec
from turbomoe.kv.codecs.plain import PlainCodec
from turbomoe.kv.pages import PAGE_TOKENS, SCRATCH_PAGE
from turbomoe.kv.turns import turn

Made = TypeVar("Made")


@dataclass(frozen=True)
class Step:
    """One forward pass over ``count`` new tokens of each of B sequences. Tensors live on the device.

    slots, starts   int64 [B]: sequence slot, and its length before the step
    pages           int64 [B, pages_per_slot]: the page table's rows of these slots
    count           tokens a sequence
    floor, reach    the smallest length before and the largest after: known to the host, so loops are static
    lone            the slot, where one sequence runs alone on the CPU: its rows are reached as views, without an index
    """

    slots: torch.Tensor
    starts: torch.Tensor
    pages: torch.Tensor
    count: int
    floor: int
    reach: int
    lone: int | None = None
    _made: dict[Hashable, object] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What ``make`` returns, made at the first call with ``key``: layers alike share index tensors and masks."""
        if key not in self._made:
            self._made[key] = make()
        return cast(Made, self._made[key])

    def rows(self, stored: torch.Tensor) -> torch.Tensor:
        """The rows of these slots, [B, ...] of [slots, ...]; do not write to them."""
        if self.lone is not None:
            return stored[self.lone : self.lone + 1]
        return stored.index_select(0, self.slots)

    def positions(self, first: int, count: int) -> torch.Tensor:
        """int64 [B, count]: positions from ``first`` (relative to the start, may be negative) on."""
        return self.starts[:, None] + torch.arange(first, first + count, device=self.starts.device)


class Side:
    """Keys or values of one layer: the same storage for both.

    sinks, ring   [slots, kv_heads, sink or recent, head_dim] in ``exact_dtype``; position p sits at p % recent
    planes        [pages, kv_heads, PAGE_TOKENS, width], one tensor for each plane of the codec
    mean          float32 [kv_heads, head_dim], what the codes lack; None when nothing is subtracted
    turns         float32 [pages_per_slot, 2r], by which the mean turns from page to page (``turns.py``); None: it stays
    scale         float32 [kv_heads, head_dim], what was divided by before coding; None for ones
    is_exact      there are no windows and pages keep every bit: the past needs nothing but pages
    """

    def __init__(
        self, codec: Codec | None, sinks: torch.Tensor, ring: torch.Tensor, planes: tuple[torch.Tensor, ...]
    ) -> None:
        self.codec, self.sinks, self.ring, self.planes = codec, sinks, ring, planes
        self.sink, self.recent, self.exact_dtype = sinks.shape[2], ring.shape[2], ring.dtype
        self.rotated = codec is not None and codec.rotated
        self.mean: torch.Tensor | None = None
        self.turns: torch.Tensor | None = None
        self.scale: torch.Tensor | None = None
        self._inverse: torch.Tensor | None = None
        self.is_exact = self.sink == self.recent == 0 and isinstance(codec, PlainCodec)

    def nbytes(self) -> int:
        """Bytes allocated: sinks, ring and pages."""
        return sum(t.nbytes for t in (self.sinks, self.ring, *self.planes))

    def clear(self, slot: int, pages: list[int]) -> None:
        """Zero the windows of ``slot`` and the given pages."""
        for stored in (self.sinks, self.ring):
            stored[slot] = 0
        for plane in self.planes:
            plane[pages] = 0

    def past(self, step: Step) -> torch.Tensor:
        """The ring in order of position, [B, kv_heads, recent, head_dim]: positions start-recent .. start-1."""
        index = step.positions(-self.recent, self.recent).remainder(max(1, self.recent))
        ring = self.ring[step.slots]
        return ring.gather(2, index[:, None, :, None].expand(-1, ring.shape[1], -1, ring.shape[3]))

    def windows(self, fresh: torch.Tensor, step: Step) -> torch.Tensor:
        """Sinks, ring (in storage order) and the new tokens [B, kv_heads, n, head_dim], side by side on axis 2."""
        return torch.cat((step.rows(self.sinks), step.rows(self.ring), fresh), 2)

    def keep(self, fresh: torch.Tensor, step: Step) -> None:
        """Store one new token a sequence, [B, kv_heads, 1, head_dim], in sinks and ring, or encode it at once."""
        self.keep_sinks(fresh, step)
        if self.recent == 0:
            self.store(fresh, step)
        elif step.lone is None:
            self.keep_recent(fresh, step)
        else:
            self.ring[step.lone, :, step.floor % self.recent] = fresh[0, :, 0]

    def keep_sinks(self, fresh: torch.Tensor, step: Step) -> None:
        """Store those new tokens [B, kv_heads, count, head_dim] whose positions are below ``sink``."""
        if step.floor >= self.sink:
            return
        source = torch.arange(self.sink, device=fresh.device) - step.starts[:, None]
        is_new = ((source >= 0) & (source < step.count))[:, None, :, None]
        index = source.clamp(0, step.count - 1)[:, None, :, None]
        new = fresh.gather(2, index.expand(-1, fresh.shape[1], -1, fresh.shape[3]))
        self.sinks[step.slots] = torch.where(is_new, new, self.sinks[step.slots])

    def keep_recent(self, fresh: torch.Tensor, step: Step) -> None:
        """Write the newest tokens of [B, kv_heads, count, head_dim] into the ring, over the oldest there."""
        kept = min(step.count, self.recent)
        if kept == 0:
            return
        index = step.positions(step.count - kept, kept).remainder(self.recent)
        self.ring[step.slots[:, None], :, index] = fresh[:, :, -kept:].transpose(1, 2)

    def store(self, leaving: torch.Tensor, step: Step) -> None:
        """Encode the ``count`` tokens that leave the ring: [B, kv_heads, count, head_dim] from start-recent on."""
        if self.codec is None:
            return
        behind = self.recent + self.sink
        page, row = step.once(("place", behind), lambda: place(step, behind))
        for plane, codes in zip(self.planes, self.codec.encode(self._prepared(leaving, step)), strict=True):
            if isinstance(page, int):
                plane[page, :, row] = codes[0, :, 0]
            else:
                plane[page, :, row] = codes.transpose(1, 2)

    def set_transform(
        self, mean: torch.Tensor, scale: torch.Tensor | None = None, turns: torch.Tensor | None = None
    ) -> None:
        """Say what is taken off before coding; see the attributes."""
        self.mean, self.scale, self.turns = mean, scale, turns
        self._inverse = None if scale is None else 1 / scale

    def _prepared(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """What the codec wants of [B, kv_heads, count, head_dim]: float32, centred, scaled, rotated as it asks for."""
        x = x.float()
        if self.mean is not None:
            mean = self.mean[:, None, :]
            x = x - (mean if self.turns is None else turn(mean, turned(step, self)[:, None]))
        if self._inverse is not None:
            x = x * self._inverse[:, None, :]
        return self.rotate(x) if self.rotated else x

    def spread(self, q: torch.Tensor) -> torch.Tensor:
        """Queries [..., kv_heads, rows, head_dim], scaled as the codes of keys want it."""
        return q if self.scale is None else q * self.scale[:, None, :]

    def decode(self, step: Step, first_page: int, last_page: int) -> torch.Tensor:
        """Decode pages [first, last) of each sequence: float32 [B, kv_heads, keys, head_dim], keys in order."""
        assert self.codec is not None
        pages = step.pages[:, first_page:last_page]
        return self.codec.decode(tuple(plane[pages].transpose(1, 2).flatten(2, 3) for plane in self.planes))

    def tile(self, step: Step, first_page: int, last_page: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Read pages [first, last) as they lie, by ``Codec.read``.

        Float32 [B, pages, kv_heads, PAGE_TOKENS, head_dim] and, if there is one, the factor of each key or value as a
        row, [B, pages, kv_heads, 1, PAGE_TOKENS].
        """
        assert self.codec is not None
        span = (first_page, last_page)
        where = step.once(("pages", *span), lambda: _span(step.pages[:, first_page:last_page], step.lone is not None))
        if isinstance(where, slice):
            planes = tuple(plane[where] for plane in self.planes)
        else:
            planes = tuple(plane.index_select(0, where) for plane in self.planes)
        values, scales = self.codec.read(planes)
        shape = (len(step.slots), -1)
        return values.unflatten(0, shape), None if scales is None else scales.unflatten(0, shape).mT

    def rotation(self) -> torch.Tensor:
        """The rotation as a matrix R, float32 [head_dim, head_dim], in the order of ``tile``: x R and y R'."""
        from turbomoe.kv.hadamard import rotation

        assert self.codec is not None
        return rotation(self.ring.shape[-1], str(self.ring.device), self.codec.stride)

    @staticmethod
    def rotate(x: torch.Tensor) -> torch.Tensor:
        """Into the rotated domain. Imported late: the plain path never loads the transform."""
        from turbomoe.kv.hadamard import rotate

        return rotate(x)

    @staticmethod
    def unrotate(x: torch.Tensor) -> torch.Tensor:
        """Back from the rotated domain."""
        from turbomoe.kv.hadamard import unrotate

        return unrotate(x)


def place(step: Step, behind: int) -> tuple[int | torch.Tensor, int | torch.Tensor]:
    """(page, row) of the codes of the tokens ``behind`` the new ones: ints for one token alone, else int64 [B, count].

    Tokens before the start of the sequence go to the scratch page.
    """
    if step.lone is not None and step.count == 1:
        at = step.floor - behind
        return (int(step.pages[0, at // PAGE_TOKENS]), at % PAGE_TOKENS) if at >= 0 else (SCRATCH_PAGE, 0)
    coded = step.positions(-behind, step.count)
    page_index = (coded.clamp(min=0) // PAGE_TOKENS).clamp(max=step.pages.shape[1] - 1)
    return step.pages.gather(1, page_index).masked_fill(coded < 0, SCRATCH_PAGE), coded.remainder(PAGE_TOKENS)


def turned(step: Step, side: Side) -> torch.Tensor:
    """Angles of the pages into which the tokens go that leave the ring in this step: float32 [B, count, 2r]."""
    turns, behind = side.turns, side.recent + side.sink
    assert turns is not None

    def find() -> torch.Tensor:
        coded = step.positions(-behind, step.count).clamp(min=0)
        return turns[(coded // PAGE_TOKENS).clamp(max=len(turns) - 1)]

    return step.once(("turned", behind), find)


def _span(pages: torch.Tensor, on_host: bool) -> slice | torch.Tensor:
    """Page ids [B, n] as a slice, where they are one run and may be looked at, else flat."""
    if on_host:
        ids = pages[0].tolist()
        if ids == list(range(ids[0], ids[0] + len(ids))):
            return slice(ids[0], ids[0] + len(ids))
    return pages.flatten()
