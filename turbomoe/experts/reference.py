"""The reference executor: plain PyTorch, float32, one expert at a time, right before it is fast.

A blob is computed where it lies: a hit from its slot, a miss from the store, by the same function on the same
bytes. Each (row, k) term is written to its own place and the terms are added in routing order, so placement
cannot change the result. The library behind the matrix products may pick another kernel for another number of
rows, so results of differently chunked rows agree to float32 rounding, not to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from turbomoe.errors import IntegrityError
from turbomoe.experts.base import ExpertExecutor, ExpertLayout, ExpertPart, ExpertWork
from turbomoe.experts.store import ExpertStore, part_views
from turbomoe.files.blocks import dequantise

if TYPE_CHECKING:
    from turbomoe.experts.slots import ExpertSlots

ACTIVATE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def expert_forward(layout: ExpertLayout, blob: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """One expert on float32 rows [n, hidden] -> float32 [n, hidden], from its packed blob on the same device."""
    views = part_views(layout, blob)
    weights = {part.name: _unpack(views[part.name], part) for part in layout.parts}
    gate = F.linear(x, weights["gate"], weights.get("gate_bias"))
    up = F.linear(x, weights["up"], weights.get("up_bias"))
    return F.linear(ACTIVATE[layout.activation](gate) * up, weights["down"], weights.get("down_bias"))


def _unpack(raw: torch.Tensor, part: ExpertPart) -> torch.Tensor:
    if part.format == "F32":
        return raw.view(torch.float32).view(part.shape)
    return dequantise(raw, part.format, part.shape, torch.float32)


def group_by_expert(ids: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Split routing ids [rows, k] into (expert, flat positions in rows * k), experts ascending."""
    flat = ids.reshape(-1).cpu()
    order = torch.argsort(flat, stable=True)
    experts, counts = torch.unique_consecutive(flat[order], return_counts=True)
    yield from zip(experts.tolist(), order.split(counts.tolist()), strict=True)


class ReferenceExecutor(ExpertExecutor):
    """Computes at ``submit``. With ``slots`` None every expert is read from the store."""

    def __init__(self, store: ExpertStore, slots: ExpertSlots | None = None) -> None:
        self._store, self._slots = store, slots
        self._terms = torch.empty(0)
        self._busy = False
        self._pinned: tuple[int, list[int]] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the workspace that is kept between calls."""
        return self._terms.nbytes

    @torch.inference_mode()
    def submit(self, work: ExpertWork) -> None:
        """Compute ``work`` into ``work.out``. ``IntegrityError`` for misshapen work or ids that are no experts."""
        if self._busy:
            raise IntegrityError("Expert work was submitted before the previous work was waited for")
        layout = self._store.layout(work.layer)
        check_work(work, layout)
        groups = list(group_by_expert(work.ids))
        self._busy = True
        self._pin(work.layer, [expert for expert, _ in groups])
        self._compute(work, layout, groups)

    def wait(self) -> None:
        """Nothing is left to do: ``submit`` has computed it."""
        if not self._busy:
            raise IntegrityError("Expert work was waited for before it was submitted")
        self.reset()

    def reset(self) -> None:
        """Forget a submission that broke off, and protect its experts no longer."""
        self._busy = False
        pinned, self._pinned = self._pinned, None
        if self._slots is not None and pinned is not None:
            self._slots.unpin(*pinned)

    def _pin(self, layer: int, experts: list[int]) -> None:
        if self._slots is not None:
            self._slots.pin(layer, experts)
            self._pinned = layer, experts

    def _compute(self, work: ExpertWork, layout: ExpertLayout, groups: list[tuple[int, torch.Tensor]]) -> None:
        rows, k = work.ids.shape
        terms = self._workspace(rows * k, layout.hidden, work.hidden.device)
        hidden = work.hidden.float()
        scale = work.weights.reshape(-1, 1).float()
        slot_of = self._slots.located(work.layer) if self._slots is not None else None
        for expert, where in groups:
            where = where.to(hidden.device)
            blob = self._blob(work.layer, expert, slot_of)
            result = expert_forward(layout, blob, hidden[where // k].to(blob.device))
            terms[where] = result.to(hidden.device) * scale[where]
        _sum_in_order(terms.view(rows, k, layout.hidden), work.out)

    def _blob(self, layer: int, expert: int, slot_of: list[int] | None) -> torch.Tensor:
        if self._slots is None or slot_of is None or slot_of[expert] < 0:
            return self._store.blob(layer, expert)
        return self._slots.blob(layer, slot_of[expert])

    def _workspace(self, terms: int, hidden: int, device: torch.device) -> torch.Tensor:
        if self._terms.numel() < terms * hidden or self._terms.device != device:
            self._terms = torch.empty(terms * hidden, device=device)
        return self._terms[: terms * hidden].view(terms, hidden)


def _sum_in_order(terms: torch.Tensor, out: torch.Tensor) -> None:
    """``out[r] = terms[r, 0] + terms[r, 1] + ...`` in float32, from left to right."""
    if terms.shape[1] == 0:
        out.zero_()
        return
    total = terms[:, 0]
    for k in range(1, terms.shape[1]):
        total += terms[:, k]
    out.copy_(total)


def check_work(work: ExpertWork, layout: ExpertLayout) -> None:
    """Raise ``IntegrityError`` for work whose shapes do not fit the layer, or whose ids are no experts of it."""
    rows = work.hidden.shape[0]
    sound = (
        work.hidden.shape == work.out.shape == (rows, layout.hidden)
        and work.ids.shape == work.weights.shape
        and work.ids.shape[:1] == (rows,)
        and work.ids.dim() == 2
        and not work.ids.is_floating_point()
    )
    if not sound:
        given = [f"{t.dtype} {tuple(t.shape)}" for t in (work.hidden, work.ids, work.weights, work.out)]
        raise IntegrityError(f"Layer {work.layer} got expert work of shapes {', '.join(given)}")
    if work.ids.numel() and not 0 <= int(work.ids.min()) <= int(work.ids.max()) < layout.num_experts:
        raise IntegrityError(f"Layer {work.layer} was routed to an expert outside 0..{layout.num_experts - 1}")
