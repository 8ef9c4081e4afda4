"""The expert room's front door: what the engine and the models see.

Per forward pass: ``begin_step(phase)``, one ``run`` per expert layer, ``end_step()``; after the last chunk of a
prompt ``end_prompt()``. With the cache off nothing of the cache is imported or allocated and a step is only a
phase.
"""

from __future__ import annotations

import torch

from turbomoe.config import ExpertSettings
from turbomoe.experts.base import ExpertWork, Phase
from turbomoe.experts.reference import ReferenceExecutor
from turbomoe.experts.store import ExpertStore


class ExpertRuntime:
    """Computes routed experts for one model, through a cache of device copies if the settings ask for one."""

    def __init__(
        self, store: ExpertStore, settings: ExpertSettings, device: torch.device | str = "cpu", top_k: int = 1
    ) -> None:
        self.store, self.device, self.top_k = store, torch.device(device), top_k
        self._executor = ReferenceExecutor(store)
        self._phase = Phase.PREFILL

    def begin_step(self, phase: Phase) -> None:
        """Open a forward pass."""
        self._phase = phase

    def run(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """``sum_k weights[:, k] * expert_ids[:, k](hidden)``: [T, H], [T, K], [T, K] -> a fresh [T, H]."""
        out = torch.empty_like(hidden)
        self._executor.submit(ExpertWork(layer, self._phase, hidden, ids, weights, out))
        self._executor.wait()
        return out

    def end_step(self) -> None:
        """Close the forward pass."""

    def end_prompt(self) -> None:
        """The prompt's last chunk has ended."""

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes held, by device."""
        return {"cpu": self.store.nbytes}
