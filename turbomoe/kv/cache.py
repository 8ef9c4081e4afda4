"""The memory of every running sequence: one object for all layers and all slots, allocated once.

Life of a step: ``reserve`` room for a slot's new tokens, ``begin`` a step over some slots, let each layer
``attend`` (or use its recurrent state), then ``commit`` to make the new lengths visible.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from turbomoe.config import KVSettings
from turbomoe.errors import ContextFullError, IntegrityError, SettingsError
from turbomoe.kv.aside import Aside
from turbomoe.kv.attention import attend
from turbomoe.kv.codecs import make_codec
from turbomoe.kv.group import SideGroup
from turbomoe.kv.layer import Side, Step
from turbomoe.kv.pages import PAGE_TOKENS, PageAllocator, pages_for
from turbomoe.kv.recurrent import RecurrentState
from turbomoe.kv.shape import AttentionShape, LayerShape

if TYPE_CHECKING:
    from turbomoe.kv.means import KVMeans

EXACT_TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
Observer = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], None]


def windows(settings: KVSettings) -> tuple[int, int]:
    """(sink, recent) that these types need: none when both sides are stored exactly."""
    exact = settings.type_k in EXACT_TYPES and settings.type_v in EXACT_TYPES
    return (0, 0) if exact else (settings.sink, settings.recent)


class KVCache:
    """Keys, values and recurrent states of ``slots`` sequences of up to ``ctx_size`` tokens each."""

    def __init__(
        self, shapes: Sequence[LayerShape], settings: KVSettings, *, slots: int, ctx_size: int,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", means: KVMeans | None = None,
    ) -> None:  # fmt: skip
        if settings.is_auto:
            raise SettingsError("KV types are still auto", fix="Choose them by insight.kv_auto.resolve_kv_types first")
        self.settings, self.ctx_size, self.device = settings, ctx_size, torch.device(device)
        self.shapes = tuple(shapes)
        self.sink, self.recent = (min(size, ctx_size) for size in windows(settings))
        per_slot = pages_for(ctx_size - self.sink - self.recent)
        self.pages = PageAllocator(slots, per_slot, self.device)
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=self.device)
        self.host_lengths = [0] * slots
        self.attention: dict[int, tuple[Side, Side]] = {}
        self.recurrent: dict[int, RecurrentState] = {}
        self.observer: Observer | None = None
        self.means_digest: str | None = None  # of what the codes lack; None when nothing is subtracted
        self.step: Step | None = None
        self.aside = Aside(self.device)
        self._active: list[int] = []
        self._groups: list[tuple[list[int], SideGroup, SideGroup]] = []
        for shape in self.shapes:
            if not isinstance(shape, AttentionShape):
                self.recurrent[shape.layer] = RecurrentState(shape, slots, dtype, self.device)
        for alike in _alike(self.shapes):
            self._add_group(alike, slots)
        if means is not None:
            self._use_means(means)

    def _add_group(self, shapes: list[AttentionShape], slots: int) -> None:
        """Allocate the layers ``shapes``, which differ in their number only."""
        shape, layers = shapes[0], [shape.layer for shape in shapes]

        def group(type_name: str) -> SideGroup:
            dtype = EXACT_TYPES.get(type_name, torch.bfloat16)
            if shape.window:
                ring = min(shape.window - 1, self.ctx_size)
                return SideGroup(shape, len(layers), None, (0, ring), slots, 0, dtype, self.device)
            codec, span = make_codec(type_name, shape.head_dim), (self.sink, self.recent)
            return SideGroup(shape, len(layers), codec, span, slots, self.pages.num_pages, dtype, self.device)

        keys, values = group(self.settings.type_k), group(self.settings.type_v)
        self._groups.append((layers, keys, values))
        self.attention.update(zip(layers, zip(keys.sides, values.sides, strict=True), strict=True))

    def _use_means(self, means: KVMeans) -> None:
        from turbomoe.kv.turns import page_turns

        turns = page_turns(means.frequencies.to(self.device), self.sink, self.pages.table.shape[1])
        for layers, keys, values in self._groups:
            if missing := [i for i in layers if (keys.rotated or values.rotated) and i not in means.keys]:
                raise IntegrityError(f"The means lack layer {missing[0]}")
            here = [[table[i].to(self.device, torch.float32) for i in layers if i in table]
                    for table in (means.keys, means.scales, means.values)]  # fmt: skip
            if keys.rotated:
                keys.set_transform(here[0], here[1] or None, turns)
            if values.rotated:
                values.set_transform(here[2])
            if keys.rotated or values.rotated:
                self.means_digest = means.digest

    def reserve(self, slot: int, length: int) -> None:
        """Make room for ``length`` tokens in ``slot``. Raises ``ContextFullError``; then nothing has changed."""
        if length > self.ctx_size:
            raise ContextFullError(
                f"The context is full: {length} tokens do not fit {self.ctx_size}",
                fix="Shorten the conversation or use a larger --ctx-size",
            )
        self.pages.reserve(slot, pages_for(length - self.sink - self.recent))

    def release(self, slot: int) -> None:
        """Forget the sequence in ``slot`` and wipe what it stored: a weight of 0 does not silence a stale NaN."""
        self.aside.settle()
        for side in (side for pair in self.attention.values() for side in pair):
            side.clear(slot, self.pages.owned(slot))
        self.pages.release(slot)
        self.host_lengths[slot] = 0
        self.lengths[slot] = 0
        for state in self.recurrent.values():
            state.clear(slot)

    @property
    def can_truncate(self) -> bool:
        """Whether a sequence can be cut back: rings and recurrent states have forgotten what that would need."""
        sides = (side for pair in self.attention.values() for side in pair)
        return not self.recurrent and all(side.recent == side.sink == 0 for side in sides)

    def truncate(self, slot: int, length: int) -> None:
        """Cut the sequence in ``slot`` back to its first ``length`` tokens."""
        if not self.can_truncate or not 0 <= length <= self.host_lengths[slot]:
            raise IntegrityError(f"Slot {slot} cannot be cut back to {length} tokens")
        self.aside.settle()
        (first, row), owned = divmod(length, PAGE_TOKENS), self.pages.owned(slot)
        for plane in (plane for pair in self.attention.values() for side in pair for plane in side.planes):
            plane[owned[first : first + 1], :, row:] = 0  # a weight of 0 does not silence a stale NaN
            plane[owned[first + 1 : pages_for(self.host_lengths[slot])]] = 0
        self.host_lengths[slot] = length
        self.lengths[slot] = length

    def begin(self, slots: Sequence[int], count: int) -> Step:
        """Open a step of ``count`` new tokens for each of ``slots`` and reserve their room.

        A step of one token encodes what leaves the rings aside: nobody looks at it before the next one.
        """
        self.aside.settle()
        for slot in slots:
            self.reserve(slot, self.host_lengths[slot] + count)
        before = [self.host_lengths[slot] for slot in slots]
        self._active = list(slots)
        index = torch.tensor(self._active, dtype=torch.int64, device=self.device)
        rows = (self.lengths[index], self.pages.table[index])
        self.step = Step(index, *rows, count, floor=min(before), reach=max(before) + count, lone=self._lone(slots))
        if count == 1:
            sides = [side for _, *both in self._groups for side in both]
            self.aside.run([work for side in sides for work in side.leaving(self.step)])
        return self.step

    def _lone(self, slots: Sequence[int]) -> int | None:
        return slots[0] if len(slots) == 1 and self.device.type == "cpu" else None

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Store and attend in one layer; see ``attention.attend`` for shapes. Returns q's dtype."""
        assert self.step is not None
        if self.observer is not None:
            self.observer(layer, q, k, v, scale)
        keys, values = self.attention[layer]
        return attend(q, k, v, keys, values, self.step, scale).to(q.dtype)

    def commit(self) -> None:
        """Close the step: the new tokens are part of their sequences."""
        assert self.step is not None
        self.lengths[self.step.slots] += self.step.count
        for slot in self._active:
            self.host_lengths[slot] += self.step.count
        self.step = None

    def nbytes(self) -> int:
        """Bytes allocated for keys and values: codes, scales, padding, exact windows, page tables."""
        sides = (side for pair in self.attention.values() for side in pair)
        return sum(side.nbytes() for side in sides) + self.pages.table.nbytes + self.lengths.nbytes

    def recurrent_nbytes(self) -> int:
        """Bytes allocated for recurrent states, which do not grow with the context."""
        return sum(state.nbytes() for state in self.recurrent.values())

    def bits_per_value(self) -> float:
        """Allocated bits over the values of a full cache: codes, scales, padding, windows and page tables."""
        shapes = [s for s in self.shapes if isinstance(s, AttentionShape) and not s.window]
        values = sum(2 * s.kv_heads * s.head_dim for s in shapes) * self.ctx_size * len(self.host_lengths)
        sides = (side for s in shapes for side in self.attention[s.layer])
        tables = self.pages.table.nbytes + self.lengths.nbytes
        return 8 * (sum(side.nbytes() for side in sides) + tables) / values if values else 0.0

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` unless pages, tables and both copies of the lengths agree."""
        self.pages.check_integrity()
        if self.lengths.tolist() != self.host_lengths:
            raise IntegrityError("Lengths on the device and on the host differ")


def _alike(shapes: Sequence[LayerShape]) -> list[list[AttentionShape]]:
    """Attention layers grouped by shape, each group in order of layers."""
    groups: dict[tuple[int, ...], list[AttentionShape]] = {}
    for shape in shapes:
        if isinstance(shape, AttentionShape):
            groups.setdefault((shape.query_heads, shape.kv_heads, shape.head_dim, shape.window), []).append(shape)
    return list(groups.values())
