"""What one attention layer remembers of every sequence slot: exact sinks, an exact ring, and pages of codes.

The rule, whatever the chunking: the query at position t sees positions below ``sink`` and t-recent..t exactly,
and everything between from codes. So a token is encoded when it leaves the ring, and a chunk longer than the
ring encodes its own early tokens before its late queries look at them.
A sliding-window layer is the same thing without sinks and codes, its ring as long as the window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from turbomoe.kv.base import Codec
from turbomoe.kv.pages import PAGE_TOKENS, SCRATCH_PAGE
from turbomoe.kv.shape import AttentionShape


@dataclass(frozen=True)
class Step:
    """One forward pass over ``count`` new tokens of each of B sequences. Tensors live on the device.

    slots, starts   int64 [B]: sequence slot, and its length before the step
    pages           int64 [B, pages_per_slot]: the page table's rows of these slots
    count           tokens a sequence
    floor, reach    the smallest length before and the largest after: known to the host, so loops are static
    """

    slots: torch.Tensor
    starts: torch.Tensor
    pages: torch.Tensor
    count: int
    floor: int
    reach: int

    def positions(self, first: int, count: int) -> torch.Tensor:
        """int64 [B, count]: positions from ``first`` (relative to the start, may be negative) on."""
        return self.starts[:, None] + torch.arange(first, first + count, device=self.starts.device)


class Side:
    """Keys or values of one layer: the same storage for both.

    sinks, ring   [slots, kv_heads, sink or recent, head_dim] in ``exact_dtype``; position p sits at p % recent
    planes        [pages, kv_heads, PAGE_TOKENS, width], one tensor for each plane of the codec
    mean          float32 [kv_heads, head_dim], what the codes lack; None when nothing is subtracted
    """

    def __init__(
        self, shape: AttentionShape, codec: Codec | None, windows: tuple[int, int], slots: int, pages: int,
        exact_dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        self.codec, (self.sink, self.recent) = codec, windows
        self.exact_dtype = exact_dtype
        self.rotated = codec is not None and codec.rotated
        self.mean: torch.Tensor | None = None
        heads, dim = shape.kv_heads, shape.head_dim
        self.sinks = torch.zeros(slots, heads, self.sink, dim, dtype=exact_dtype, device=device)
        self.ring = torch.zeros(slots, heads, self.recent, dim, dtype=exact_dtype, device=device)
        self.planes = tuple(
            torch.zeros(pages, heads, PAGE_TOKENS, plane.width, dtype=plane.dtype, device=device)
            for plane in (codec.planes if codec else ())
        )

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
        coded = step.positions(-self.recent - self.sink, step.count)
        page_index = (coded.clamp(min=0) // PAGE_TOKENS).clamp(max=step.pages.shape[1] - 1)
        page = step.pages.gather(1, page_index).masked_fill(coded < 0, SCRATCH_PAGE)
        row = coded.remainder(PAGE_TOKENS)
        for plane, codes in zip(self.planes, self.codec.encode(self._prepared(leaving)), strict=True):
            plane[page, :, row] = codes.transpose(1, 2)

    def _prepared(self, x: torch.Tensor) -> torch.Tensor:
        """What the codec wants: float32, centred and rotated where it asks for that."""
        x = x.float() if self.mean is None else x.float() - self.mean[:, None, :]
        return self.rotate(x) if self.rotated else x

    def decode(self, step: Step, first_page: int, last_page: int) -> torch.Tensor:
        """Decode pages [first, last) of each sequence: float32 [B, kv_heads, keys, head_dim], keys in order."""
        assert self.codec is not None
        pages = step.pages[:, first_page:last_page]
        return self.codec.decode(tuple(plane[pages].transpose(1, 2).flatten(2, 3) for plane in self.planes))

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
