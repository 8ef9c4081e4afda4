"""Least recently used, as a residency policy: every missed expert is promoted over the one unused for longest.

It is here to be compared with. The score of an expert is the number of the token that used it last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from turbomoe.config import ExpertSettings
from turbomoe.experts.residency import Ids, ResidencyPolicy, count_ids


class RecencyPolicy(ResidencyPolicy):
    """``ResidencyPolicy`` with recency for a score, no hysteresis, and as many swaps as there are misses."""

    def __init__(
        self, num_experts: Sequence[int], blob_bytes: Sequence[int], top_k: int, settings: ExpertSettings
    ) -> None:
        eager = replace(settings, hysteresis=1.0, min_sightings=1, swaps_per_layer_step=max(num_experts))
        super().__init__(num_experts, blob_bytes, top_k, eager)
        self._clock = 0

    def observe(self, ids: Ids) -> None:
        """A decode step: ids [layers, rows, k]. All of its rows are one moment."""
        self._clock += 1
        self.routed = count_ids(ids, self.exists.shape[1]) > 0
        self.scores[self.routed] = self._clock
        self.sightings[self.routed] = 1

    def observe_prompt(self, ids: Ids) -> None:
        """A prefill chunk: ids [layers, rows, k], one row a token."""
        layers, rows, _ = ids.shape
        moments = np.broadcast_to(self._clock + 1 + np.arange(rows)[:, None], ids.shape)
        where = np.broadcast_to(np.arange(layers)[:, None, None], ids.shape)[ids >= 0]
        np.maximum.at(self._prompt_scores, (where, ids[ids >= 0]), moments[ids >= 0])
        self._clock += rows
        self.routed = self._prompt_scores > self._clock - rows

    def end_prompt(self) -> None:
        """What the prompt used last is what was used last."""
        self.scores = np.maximum(self.scores, self._prompt_scores)
        self.sightings[self._prompt_scores > 0] = 1
        self.routed[:] = False  # a prompt uses nearly every expert, and protecting them all would stop every swap
        self.drop_prompt()

    def seed_prior(self, counts: npt.ArrayLike, weight: float = 16.0) -> None:
        """A prior orders what was never used; ``weight`` has no meaning here."""
        prior = np.where(self.exists, np.asarray(counts, dtype=np.float64), 0.0)
        self.scores += prior / np.maximum(prior.max(axis=1, keepdims=True), 1e-300) / 2


def make_policy(
    num_experts: Sequence[int], blob_bytes: Sequence[int], top_k: int, settings: ExpertSettings
) -> ResidencyPolicy:
    """The policy that the settings name."""
    kind = RecencyPolicy if settings.policy == "lru" else ResidencyPolicy
    return kind(num_experts, blob_bytes, top_k, settings)
