"""How a model routes: is the load even, does it differ by domain, do neighbouring tokens choose alike?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LAGS = (1, 8)


@dataclass
class Routing:
    """Counts over the texts of one domain: choices [layers, experts] and, for each lag, repeated choices and pairs."""

    counts: Tensor
    repeated: dict[int, float] = field(default_factory=lambda: dict.fromkeys(LAGS, 0.0))
    pairs: dict[int, int] = field(default_factory=lambda: dict.fromkeys(LAGS, 0))

    @classmethod
    def empty(cls, layers: int, experts: int) -> Routing:
        """Nothing seen yet."""
        return cls(torch.zeros(layers, experts, dtype=torch.float64))

    def add(self, routes: list[Tensor], batch: int, used: int) -> None:
        """Expert ids [batch * time, active] of every layer; only the first ``used`` sequences count."""
        for layer, ids in enumerate(routes):
            ids = ids.view(batch, -1, ids.shape[-1])[:used]
            self.counts[layer] += ids.flatten().bincount(minlength=self.counts.shape[1]).double().cpu()
            for lag in LAGS:
                same = (ids[:, lag:, :, None] == ids[:, :-lag, None, :]).any(-1)
                self.repeated[lag] += float(same.sum())
                self.pairs[lag] += same.numel()

    def report(self) -> dict[str, Any]:
        """Effective experts of each layer (exp of the entropy of the load), share of choices that go to the busiest
        quarter (mean over layers), and the chance that a chosen expert was chosen ``lag`` tokens before.
        """
        shares = self.counts / self.counts.sum(1, keepdim=True)
        entropy = -(shares * shares.clamp_min(1e-12).log()).sum(1)
        busiest = shares.sort(1, descending=True).values[:, : shares.shape[1] // 4].sum(1)
        return {
            "effective_experts": [round(float(value), 1) for value in entropy.exp()],
            "top_quarter": round(float(busiest.mean()), 4),
            "reuse": {lag: round(self.repeated[lag] / max(1, self.pairs[lag]), 4) for lag in LAGS},
        }


def transfer(domains: dict[str, Routing]) -> dict[str, dict[str, float]]:
    """Share of the column domain's choices that go to the quarter of experts that is busiest in the row domain."""
    table: dict[str, dict[str, float]] = {}
    for source, routing in domains.items():
        busiest = routing.counts.argsort(1, descending=True)[:, : routing.counts.shape[1] // 4]
        table[source] = {
            target: round(float((other.counts.gather(1, busiest).sum(1) / other.counts.sum(1)).mean()), 4)
            for target, other in domains.items()
        }
    return table
