"""The native executor: packed experts on the CPU, all of a layer's work in one call of the C core.

A hit is computed from its slot and a miss from the store, by the same kernel on the same bytes. Activations are
rounded to int8 once on their way into each matrix, as everywhere on the packed path.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from turbomoe.errors import IntegrityError
from turbomoe.experts.base import ExpertExecutor, ExpertLayout, ExpertWork, Phase
from turbomoe.experts.reference import check_work
from turbomoe.experts.store import ExpertStore
from turbomoe.native.kernels import MANY, ExpertsKernel
from turbomoe.native.library import NativeError
from turbomoe.native.packed import MATRICES, ExpertShape, PackedExperts, expert_shape

if TYPE_CHECKING:
    from turbomoe.experts.slots import ExpertSlots
    from turbomoe.native.pool import WorkerPool

ROWS = 512  # rows of one call: more are cut into several, so that the core's room stays small


class NativeExecutor(ExpertExecutor):
    """Computes planar blobs of ``store`` (and of ``slots`` on the CPU) on ``pool``; without one, in PyTorch.

    ``submit`` returns while workers compute; only of work beyond 512 rows it computes all but the last part itself.
    """

    def __init__(self, store: ExpertStore, pool: WorkerPool | None, slots: ExpertSlots | None = None) -> None:
        if not store.planar:
            raise IntegrityError("The native executor was given blobs that are not packed as planes")
        self._store, self._pool, self._slots = store, pool, slots
        self._layers = [PackedExperts(planar_shape(layout), _blobs(store, layout)) for layout in store.layouts]
        self._slot_of: dict[int, list[int]] = {}  # the map that a layer's blobs were last taken from
        self._kernel: ExpertsKernel | None = None
        self._room = (0, 0)  # rows, experts a row
        self._pinned: tuple[int, list[int]] | None = None
        self._busy = False

    @torch.inference_mode()
    def submit(self, work: ExpertWork) -> None:
        """Start ``work``. ``IntegrityError`` for misshapen work or ids that are no experts."""
        if self._busy:
            raise IntegrityError("Expert work was submitted before the previous work was waited for")
        layout = self._store.layout(work.layer)
        check_work(work, layout)
        self._busy = True
        if not work.ids.numel():
            work.out.zero_()
            return
        try:
            self._start(work, self._experts(work))
        except NativeError as error:
            self._release()
            what = f"Layer {work.layer} got expert work that cannot be computed"
            raise IntegrityError(what, why=str(error)) from error

    def wait(self) -> None:
        """Work until the submitted work is done."""
        if not self._busy:
            raise IntegrityError("Expert work was waited for before it was submitted")
        self.reset()

    def reset(self) -> None:
        """Let a submission end, whether or not it broke off, and protect its experts no longer."""
        if self._kernel is not None:
            self._kernel.wait()
        self._release()

    @property
    def nbytes(self) -> int:
        """Bytes of workspace between calls that PyTorch knows of: none (the core's room is its own)."""
        return 0

    def _start(self, work: ExpertWork, experts: PackedExperts) -> None:
        ids, weights = work.ids.contiguous(), work.weights.float().contiguous()
        hidden, out = work.hidden.contiguous(), work.out
        kernel = self._kernel_for(min(len(ids), ROWS), ids.shape[1])
        many = work.phase is Phase.PREFILL and len(ids) >= MANY
        last = (len(ids) - 1) // ROWS * ROWS
        for start in range(0, last, ROWS):
            part = slice(start, start + ROWS)
            kernel.run(experts, hidden[part], ids[part], weights[part], out[part], many=many)
        kernel.submit(experts, hidden[last:], ids[last:], weights[last:], out[last:], many=many)

    def _kernel_for(self, rows: int, top: int) -> ExpertsKernel:
        """The kernel, with room for so much; it grows and never shrinks."""
        if self._kernel is None or rows > self._room[0] or top > self._room[1]:
            self._room = max(rows, self._room[0]), max(top, self._room[1])
            layouts = self._store.layouts
            self._kernel = ExpertsKernel(
                self._pool,
                hidden=max(layout.hidden for layout in layouts),
                width=max(layout.width for layout in layouts),
                experts=max(layout.num_experts for layout in layouts),
                top=self._room[1],
                rows=self._room[0],
            )
        return self._kernel

    def _experts(self, work: ExpertWork) -> PackedExperts:
        """The layer's experts where they lie now; the used ones pinned if there are slots."""
        position = self._store.positions[work.layer]
        if self._slots is None:
            return self._layers[position]
        slot_of = self._slots.located(work.layer)
        if self._slot_of.get(position) != slot_of:
            layout = self._store.layouts[position]
            self._slot_of[position] = list(slot_of)
            blobs = _located(self._store, self._slots, layout, slot_of)
            self._layers[position] = PackedExperts(self._layers[position].shape, blobs)
        self._pinned = work.layer, work.ids.unique().tolist()
        self._slots.pin(*self._pinned)
        return self._layers[position]

    def _release(self) -> None:
        self._busy = False
        if self._slots is not None and self._pinned is not None:
            self._slots.unpin(*self._pinned)
            self._pinned = None


def planar_shape(layout: ExpertLayout) -> ExpertShape:
    """The C core's description of a planar layout; ``IntegrityError`` if the two place a part differently."""
    biases = [part.name for part in layout.parts if part.name not in MATRICES]
    formats = {part.name: part.format for part in layout.parts}
    shape = expert_shape(layout.hidden, layout.width, formats, layout.activation, biases)
    if shape.nbytes != layout.blob_bytes or any(shape.offsets[part.name] != part.offset for part in layout.parts):
        raise IntegrityError(f"The experts of layer {layout.layer} are not laid out as the C core reads them")
    return shape


def _blobs(store: ExpertStore, layout: ExpertLayout) -> list[torch.Tensor]:
    return [store.blob(layout.layer, expert) for expert in range(layout.num_experts)]


def _located(store: ExpertStore, slots: ExpertSlots, layout: ExpertLayout, slot_of: list[int]) -> list[torch.Tensor]:
    return [
        store.blob(layout.layer, expert) if slot < 0 else slots.blob(layout.layer, slot)
        for expert, slot in enumerate(slot_of)
    ]
