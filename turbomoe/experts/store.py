"""Host truth: every expert of the model, complete, as opaque blobs in arenas by size class.

Files mix block formats from layer to layer, so blobs differ in size between layers and never within one.
Layers whose blobs are equally large share an arena; its rows are anonymous.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from turbomoe.errors import IntegrityError, ModelError
from turbomoe.experts.arena import allocate, pad
from turbomoe.experts.base import ExpertLayout, ExpertPart
from turbomoe.files.blocks import packed_bytes
from turbomoe.native.layout import packed_layout
from turbomoe.native.packed import pack_into

if TYPE_CHECKING:
    from turbomoe.native.pool import WorkerPool

ACTIVATIONS = ("silu", "gelu_tanh")


def make_layout(
    layer: int,
    num_experts: int,
    hidden: int,
    width: int,
    activation: str,
    parts: Sequence[tuple[str, tuple[int, ...], str]],
    *,
    planar: bool = False,
) -> ExpertLayout:
    """Lay out one expert of ``layer``: each part (name, torch shape, block format) at its own aligned offset.

    ``gate``, ``up`` [width, hidden] and ``down`` [hidden, width] are required; ``gate_bias``, ``up_bias`` [width]
    and ``down_bias`` [hidden] may follow. ``planar`` packs the matrices as planes; biases must then be F32. Raises
    ``ModelError`` naming the layer and the part.
    """
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ModelError(f"Layer {layer} has experts with activation {activation!r}", why=f"Known are {known}")
    if min(num_experts, hidden, width) < 1:
        raise ModelError(f"Layer {layer} cannot have {num_experts} experts of hidden size {hidden} and width {width}")
    _check_parts(layer, hidden, width, parts)
    placed, offset = [], 0
    for name, shape, fmt in parts:
        nbytes = _planar_bytes(fmt, shape) if planar else packed_bytes(fmt, shape)
        placed.append(ExpertPart(name, tuple(shape), fmt, offset, nbytes))
        offset += pad(nbytes)
    return ExpertLayout(layer, num_experts, hidden, width, activation, tuple(placed), offset, planar)


def _planar_bytes(fmt: str, shape: tuple[int, ...]) -> int:
    """Bytes of one part among planes; its offsets are then those that the C core computes for itself."""
    if len(shape) == 2:
        return packed_layout(fmt, *shape).nbytes
    if fmt != "F32":
        raise ModelError(f"Expert biases in {fmt} cannot be packed", why="the C core adds them in F32")
    return packed_bytes(fmt, shape)


def _check_parts(layer: int, hidden: int, width: int, parts: Sequence[tuple[str, tuple[int, ...], str]]) -> None:
    expected = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    biases = {"gate_bias": (width,), "up_bias": (width,), "down_bias": (hidden,)}
    names = [name for name, _, _ in parts]
    for name in expected:
        if names.count(name) != 1:
            raise ModelError(f"Layer {layer} has {names.count(name)} expert parts called {name!r}, not one")
    for name, shape, _ in parts:
        wanted = (expected | biases).get(name)
        if wanted is None or names.count(name) != 1:
            raise ModelError(f"Layer {layer} has an unexpected expert part {name!r}")
        if tuple(shape) != wanted:
            raise ModelError(f"Layer {layer}, expert part {name!r} has shape {tuple(shape)}, not {wanted}")


def part_views(layout: ExpertLayout, blob: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parts of one blob (uint8 [blob_bytes], any device) as packed uint8 views by name."""
    return {part.name: blob[part.offset : part.offset + part.nbytes] for part in layout.parts}


class ExpertStore:
    """Complete experts in RAM, read-only for the life of the model. Safe to share between threads."""

    def __init__(self, layouts: Sequence[ExpertLayout]) -> None:
        self.layouts = tuple(layouts)
        self.layers = tuple(layout.layer for layout in layouts)
        self.positions = {layer: i for i, layer in enumerate(self.layers)}
        if not layouts or len(self.positions) != len(layouts):
            raise ModelError(f"An expert store needs each layer once, not {list(self.layers)}")
        self._first_row: list[int] = []
        rows: dict[int, int] = {}
        for layout in layouts:
            self._first_row.append(rows.get(layout.blob_bytes, 0))
            rows[layout.blob_bytes] = self._first_row[-1] + layout.num_experts
        self.size_classes: Mapping[int, int] = rows  # blob bytes -> number of blobs
        self._arenas = {size: allocate(count, size, torch.device("cpu")) for size, count in rows.items()}

    def layout(self, layer: int) -> ExpertLayout:
        """Layout of the experts of ``layer``; ``ModelError`` if it has none."""
        position = self.positions.get(layer)
        if position is None:
            raise ModelError(f"Layer {layer} has no routed experts")
        return self.layouts[position]

    def blob(self, layer: int, expert: int) -> torch.Tensor:
        """One whole expert, uint8 [blob_bytes]: a view. Never write to it."""
        layout = self.layout(layer)
        if not 0 <= expert < layout.num_experts:
            raise ModelError(f"Layer {layer} has experts 0 to {layout.num_experts - 1}, not {expert}")
        return self._arenas[layout.blob_bytes][self._first_row[self.positions[layer]] + expert]

    def parts(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """The packed parts of one expert by name, uint8 views."""
        return part_views(self.layout(layer), self.blob(layer, expert))

    @property
    def planar(self) -> bool:
        """Whether every layer's blobs are packed as planes."""
        return all(layout.planar for layout in self.layouts)

    @property
    def nbytes(self) -> int:
        """Bytes of all blobs, padding included."""
        return sum(arena.numel() for arena in self._arenas.values())


class StoreBuilder:
    """Fills a store part by part, in any order, each part once. Parts may be filled from several threads.

    ``pool`` packs planar parts (None: PyTorch does).
    """

    def __init__(self, layouts: Sequence[ExpertLayout], pool: WorkerPool | None = None) -> None:
        self._store, self._pool = ExpertStore(layouts), pool
        self._filled = [np.zeros((layout.num_experts, len(layout.parts)), dtype=bool) for layout in layouts]
        self._finished = False

    def fill(self, layer: int, expert: int, part: str, raw: torch.Tensor) -> None:
        """Put a part's blocks ``raw`` (uint8, exactly their size) into the store. Raises ``ModelError``."""
        if self._finished:
            raise IntegrityError("An expert store was written to after it was finished")
        where = f"Layer {layer}, expert {expert}, part {part!r}"
        views = self._store.parts(layer, expert)
        if part not in views:
            raise ModelError(f"{where} is not in the layout")
        layout, column = self._store.layout(layer), list(views).index(part)
        place = layout.parts[column]
        expected = packed_bytes(place.format, place.shape)
        if raw.dtype != torch.uint8 or raw.numel() != expected:
            raise ModelError(f"{where} has {raw.numel()} x {raw.dtype}, not {expected} bytes")
        done = self._filled[self._store.positions[layer]]
        if done[expert, column]:
            raise ModelError(f"{where} was given twice")
        self._write(views[part], raw.reshape(-1), place, layout.planar)
        done[expert, column] = True

    def _write(self, view: torch.Tensor, raw: torch.Tensor, part: ExpertPart, planar: bool) -> None:
        if planar and len(part.shape) == 2:
            pack_into(view, raw, part.format, *part.shape, self._pool)
        else:
            view.copy_(raw)

    def finish(self) -> ExpertStore:
        """Hand over the store; ``ModelError`` naming the first missing part if it is not complete."""
        for layout, done in zip(self._store.layouts, self._filled, strict=True):
            missing = np.argwhere(~done)
            if len(missing):
                expert, column = missing[0]
                part = layout.parts[column].name
                raise ModelError(f"Layer {layout.layer}, expert {expert}: part {part!r} is missing")
        self._finished = True
        return self._store
