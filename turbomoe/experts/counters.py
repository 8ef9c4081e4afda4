"""What the cache did, per layer and phase: counts, no clocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from turbomoe.experts.base import Phase

PHASES = tuple(Phase)


@dataclass
class ExpertCounters:
    """int64 arrays [phases in the order of ``Phase``, layers]. A hit or miss is one (row, k) pair of the routing.

    ``uploads`` counts copies begun (``upload_bytes`` their bytes), in the phase of the step around which they began.
    """

    layers: int
    hits: npt.NDArray[np.int64] = field(init=False)
    misses: npt.NDArray[np.int64] = field(init=False)
    uploads: npt.NDArray[np.int64] = field(init=False)
    upload_bytes: npt.NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        for name in ("hits", "misses", "uploads", "upload_bytes"):
            setattr(self, name, np.zeros((len(PHASES), self.layers), dtype=np.int64))

    def hit_rate(self, phase: Phase) -> float:
        """Share of hits over all layers, 0 if nothing was routed."""
        row = PHASES.index(phase)
        routed = int(self.hits[row].sum() + self.misses[row].sum())
        return int(self.hits[row].sum()) / routed if routed else 0.0

    def to_json(self) -> dict[str, Any]:
        """Per phase: totals and hit rate."""
        return {
            phase.value: {
                "hits": int(self.hits[row].sum()),
                "misses": int(self.misses[row].sum()),
                "hit_rate": round(self.hit_rate(phase), 4),
                "uploads": int(self.uploads[row].sum()),
                "upload_bytes": int(self.upload_bytes[row].sum()),
            }
            for row, phase in enumerate(PHASES)
        }
