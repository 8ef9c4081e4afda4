"""The cache as one thing: slots, policy, promotion and counters, driven by the beginning and end of steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from turbomoe.config import ExpertSettings
from turbomoe.errors import IntegrityError
from turbomoe.experts.base import Phase
from turbomoe.experts.counters import PHASES, ExpertCounters
from turbomoe.experts.integrity import check_promoter, check_slots
from turbomoe.experts.promotion import CopyEngine, Promoter
from turbomoe.experts.recency import make_policy
from turbomoe.experts.residency import Residents, count_ids
from turbomoe.experts.routing import RoutingLog
from turbomoe.experts.slots import ExpertSlots
from turbomoe.experts.store import ExpertStore


class ExpertCache:
    """Device copies of hot experts. ``quotas`` (slots per layer) fix what it may ever take on ``device``."""

    def __init__(
        self,
        store: ExpertStore,
        settings: ExpertSettings,
        quotas: Sequence[int],
        device: torch.device,
        top_k: int,
        engine: CopyEngine,
    ) -> None:
        sizes = [layout.blob_bytes for layout in store.layouts]
        self.store, self.settings = store, settings
        self.slots = ExpertSlots(store, quotas, device)
        self.policy = make_policy([layout.num_experts for layout in store.layouts], sizes, top_k, settings)
        self.promoter = Promoter(self.slots, engine)
        self.counters = ExpertCounters(len(store.layouts))
        self.routing = RoutingLog(len(store.layouts), top_k, device)
        self._phase: Phase | None = None  # None between steps
        self._blob_bytes = np.array(sizes, dtype=np.int64)
        self._uploads_counted = np.zeros(len(sizes), dtype=np.int64)

    def begin_step(self, phase: Phase) -> None:
        """The boundary: retire what exceeds its quota, map what has landed, go on with what waited for readers."""
        self.routing.clear()
        self.promoter.retire(self._surplus())
        self.promoter.advance()
        if self.settings.policy == "frozen":
            self._settle()
        self._count_uploads(phase)
        self._phase = phase

    def record(self, layer: int, ids: torch.Tensor) -> None:
        """Note the routing ids [rows, k] of ``layer``. A pass outside a step (calibration, a test) leaves no trace."""
        if self._phase is not None:
            self.routing.record(self.store.positions[layer], ids)

    def end_step(self) -> None:
        """Observe the step's routing; after a decode step plan promotions and start them."""
        if self._phase is None:
            raise IntegrityError("An expert step was ended that had not begun")
        phase, self._phase = self._phase, None
        ids = self.routing.take()
        self._count_hits(phase, ids)
        if phase is Phase.PREFILL:
            self.policy.observe_prompt(ids)
            return
        self.policy.observe(ids)
        self._promote(phase)

    def end_prompt(self) -> None:
        """Seed the scores from the prompt that has just ended, and start filling."""
        if self._phase is not None:
            raise IntegrityError("A prompt was ended within an expert step")
        self.policy.end_prompt()
        self._promote(Phase.PREFILL)

    def resize(self, quotas: Sequence[int]) -> None:
        """New quotas per layer, within the capacity of each size class. Takes effect at the next step."""
        self.slots.resize(quotas)

    def residents(self) -> Residents:
        """What the policy may know of the cache."""
        return Residents(self.slots.slot_of >= 0, self.promoter.in_flight, self.slots.pins > 0, self.slots.vacant())

    def check_integrity(self, compare_bytes: bool = False) -> None:
        """Raise ``IntegrityError`` if an invariant is broken; compare the copies' bytes too if asked."""
        check_slots(self.slots, compare_bytes)
        check_promoter(self.promoter)

    def describe(self) -> dict[str, Any]:
        """Sizes, occupation and counters, ready for JSON."""
        promoter, slots = self.promoter, self.slots
        return {
            "device": str(slots.device),
            "policy": self.settings.policy,
            "slots_per_layer": slots.quota.tolist(),
            "slots_used": slots.used.tolist(),
            "bytes": slots.nbytes + self.routing.nbytes,
            "evicted": promoter.evicted,
            "failed": promoter.failed,
            "cancelled": promoter.cancelled,
            "phases": self.counters.to_json(),
        }

    def _surplus(self) -> list[tuple[int, int]]:
        excess = self.slots.used - self.promoter.leaving() - self.slots.quota
        return self.policy.surplus(self.residents(), excess) if (excess > 0).any() else []

    def _promote(self, phase: Phase) -> None:
        self.promoter.apply(self.policy.plan(self.residents()))
        self._count_uploads(phase)

    def _settle(self) -> None:
        """A frozen placement is complete before its first step, so that no token sees it change."""
        self.promoter.drain()
        if moves := self.policy.fill(self.residents()):
            self.promoter.apply(moves)
            self.promoter.drain()

    def _count_hits(self, phase: Phase, ids: npt.NDArray[np.int32]) -> None:
        counts = count_ids(ids, self.slots.slot_of.shape[1])
        hits = np.where(self.slots.slot_of >= 0, counts, 0).sum(axis=1).astype(np.int64)
        row = PHASES.index(phase)
        self.counters.hits[row] += hits
        self.counters.misses[row] += counts.sum(axis=1).astype(np.int64) - hits

    def _count_uploads(self, phase: Phase) -> None:
        new = self.promoter.started - self._uploads_counted
        self._uploads_counted += new
        row = PHASES.index(phase)
        self.counters.uploads[row] += new
        self.counters.upload_bytes[row] += new * self._blob_bytes
