"""The expert room's front door: what the engine and the models see.

Per forward pass: ``begin_step(phase)``, one ``run`` per expert layer, ``end_step()``; after the last chunk of a
prompt ``end_prompt()``, or ``drop_prompt()`` if it is given up. With the cache off nothing of the cache is imported
or allocated, and a step is only a phase.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from turbomoe.config import ExpertSettings
from turbomoe.errors import SettingsError
from turbomoe.experts.base import ExpertWork, Phase, RoutingObserver
from turbomoe.experts.outputs import Outputs
from turbomoe.experts.reference import ReferenceExecutor
from turbomoe.experts.store import ExpertStore

if TYPE_CHECKING:
    import numpy.typing as npt

    from turbomoe.experts.cache import ExpertCache
    from turbomoe.experts.native import NativeExecutor
    from turbomoe.experts.promotion import CopyEngine
    from turbomoe.native.pool import WorkerPool


class ExpertRuntime:
    """Computes the routed experts of one model, through a cache of device copies if the settings ask for one.

    ``device`` is where slots would lie, ``top_k`` the experts of one row. ``cache`` is None when it is off.
    ``engine`` carries copies to the device; the default copies at once, in the caller's order. ``pool`` computes
    experts that are packed as planes. Who sets ``observer`` hears of the routing of every pass.
    """

    def __init__(
        self,
        store: ExpertStore,
        settings: ExpertSettings,
        device: torch.device | str = "cpu",
        top_k: int = 1,
        engine: CopyEngine | None = None,
        pool: WorkerPool | None = None,
    ) -> None:
        self.store, self.settings, self.device, self.top_k = store, settings, torch.device(device), top_k
        self.cache = None if settings.cache == "off" else self._build_cache(engine)
        self._executor = self._build_executor(pool)
        self._outputs = Outputs()
        self._phase = Phase.PREFILL
        self.observer: RoutingObserver | None = None

    def _build_cache(self, engine: CopyEngine | None) -> ExpertCache | None:
        from turbomoe.experts.cache import ExpertCache
        from turbomoe.experts.promotion import ImmediateCopies
        from turbomoe.experts.sizing import cache_quotas

        quotas = cache_quotas(self.store, self.settings, self.device, self.top_k)
        if quotas is None:
            return None
        return ExpertCache(self.store, self.settings, quotas, self.device, self.top_k, engine or ImmediateCopies())

    def _build_executor(self, pool: WorkerPool | None) -> ReferenceExecutor | NativeExecutor:
        slots = self.cache.slots if self.cache else None
        if not self.store.planar:
            return ReferenceExecutor(self.store, slots)
        from turbomoe.experts.native import NativeExecutor

        return NativeExecutor(self.store, pool, slots)

    def begin_step(self, phase: Phase) -> None:
        """Open a forward pass: the only moment at which the placement that ``run`` sees changes."""
        self._phase = phase
        if self.cache:
            self.cache.begin_step(phase)
        if self.observer:
            self.observer.begin_step(phase)

    def run(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """``sum_k weights[:, k] * expert_ids[:, k](hidden)``: [T, H], [T, K], [T, K] -> [T, H].

        In a decode step the result lies at an address that is the same for equal T; the caller may write to it, and
        has it until the same layer runs again. Any other pass gets fresh memory: its T is large and seldom the same.
        """
        decode = self._phase is Phase.DECODE
        out = (
            self._outputs.like(layer, hidden)
            if decode
            else torch.empty_like(hidden, memory_format=torch.contiguous_format)
        )
        try:
            self._executor.submit(ExpertWork(layer, self._phase, hidden, ids, weights, out))
            self._executor.wait()
        except BaseException:  # Ctrl-C too: work that is never waited for would block every later step
            self._executor.reset()
            raise
        if self.cache:
            self.cache.record(layer, ids)
        if self.observer:
            self.observer.record(layer, hidden, ids, weights)
        return out

    def end_step(self) -> None:
        """Close the forward pass: observe its routing, plan promotions, start copies."""
        self._phase = Phase.PREFILL
        if self.cache:
            self.cache.end_step()
        if self.observer:
            self.observer.end_step()

    def end_prompt(self) -> None:
        """The prompt's last chunk has ended: seed the residency from its routing."""
        if self.cache:
            self.cache.end_prompt()
        if self.observer:
            self.observer.end_prompt()

    def drop_prompt(self) -> None:
        """The prompt was given up before its end: forget the routing of its chunks. Does nothing with the cache off."""
        if self.cache:
            self.cache.policy.drop_prompt()
        if self.observer:
            self.observer.drop_prompt()

    def seed_prior(self, counts: npt.ArrayLike, weight: float = 16.0) -> None:
        """Start from a profile's routing counts [layers, experts], worth ``weight`` tokens. Before the first step."""
        if self.cache:
            self.cache.policy.seed_prior(counts, weight)

    def resize(self, quota: int | Sequence[int]) -> None:
        """Slots per layer from the next step on: one number for all (capped at a layer's experts), or one each.

        ``SettingsError`` when the cache is off, out of range, or beyond the memory that it was built with.
        """
        if self.cache is None:
            raise SettingsError("There is no expert cache to resize", fix="Start with --moe-cache SIZE")
        if isinstance(quota, int):
            quota = [min(quota, layout.num_experts) for layout in self.store.layouts]
        self.cache.resize(quota)

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes held by device, workspace included."""
        held = self._outputs.nbytes()
        held["cpu"] += self.store.nbytes + self._executor.nbytes
        if self.cache:
            held[str(self.device)] += self.cache.slots.nbytes + self.cache.routing.nbytes
        return dict(held)

    def check_integrity(self, compare_bytes: bool = False) -> None:
        """Raise ``IntegrityError`` if an invariant of the cache is broken."""
        if self.cache:
            self.cache.check_integrity(compare_bytes)

    def describe(self) -> dict[str, Any]:
        """Facts and counters, ready for JSON."""
        facts = {"layers": len(self.store.layouts), "top_k": self.top_k, "bytes": self.nbytes}
        return facts | {"cache": self.cache.describe() if self.cache else "off"}
