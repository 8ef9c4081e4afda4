"""Which experts deserve a slot: decayed counts with hysteresis. Pure arithmetic on arrays.

No clock, no device, no randomness: a simulator that replays recorded routing runs this very code.

The score of an expert is the sum, over past decode steps, of how often it was routed, halved every ``half_life``
steps, for residents and others alike. Scores of two experts keep their ratio while neither is used, so an
outsider overtakes only by being used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from turbomoe.config import ExpertSettings

FORGOTTEN = 1 / 16  # below this score (one sighting, four half-lives ago) sightings no longer count

Ids = npt.NDArray[np.integer]
Counts = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


class Move(NamedTuple):
    """Bring ``expert`` into a slot of the layer at ``position``: over ``victim``, or into a free one if -1."""

    position: int
    expert: int
    victim: int = -1


@dataclass(frozen=True)
class Residents:
    """The cache as the policy sees it, [layers, experts] but for ``vacant``, the free slots of each layer."""

    resident: Flags
    in_flight: Flags
    pinned: Flags
    vacant: npt.NDArray[np.int64]


def count_ids(ids: Ids, num_experts: int, weights: npt.ArrayLike | None = None) -> Counts:
    """Sum of ``weights`` (broadcast to ids; 1 each without) by expert: ids [layers, rows, k], -1 for none ->
    [layers, experts].
    """
    layers = ids.shape[0]
    real = ids >= 0
    flat = (ids + np.arange(layers)[:, None, None] * num_experts)[real]
    mass = None if weights is None else np.broadcast_to(np.asarray(weights, dtype=np.float64), ids.shape)[real]
    return np.bincount(flat, mass, layers * num_experts).reshape(layers, num_experts).astype(np.float64, copy=False)


class ResidencyPolicy:
    """Scores of all experts and the moves they justify. All arrays [layers, experts]."""

    def __init__(
        self, num_experts: Sequence[int], blob_bytes: Sequence[int], top_k: int, settings: ExpertSettings
    ) -> None:
        self.settings, self.top_k = settings, top_k
        self.decay = 0.5 ** (1 / settings.half_life)
        self.blob_bytes = np.array(blob_bytes, dtype=np.int64)
        # Unspent allowance is kept up to one blob, or a budget below the size of a blob would never move one.
        self._most_allowed = max(settings.bytes_per_step, int(self.blob_bytes.max()))
        width = max(num_experts)
        self.exists = np.arange(width) < np.array(num_experts)[:, None]
        self.scores = np.zeros(self.exists.shape)
        self.sightings = np.zeros(self.exists.shape)
        self.routed = np.zeros(self.exists.shape, dtype=bool)  # in the step that has just ended
        self._prompt_scores = np.zeros(self.exists.shape)
        self._prompt_sightings = np.zeros(self.exists.shape)
        self._allowance = 0

    # -- what was seen -------------------------------------------------------------------------------------

    def observe(self, ids: Ids) -> None:
        """A decode step: ids [layers, rows, k], one row a sequence, -1 where nothing was routed."""
        counts = count_ids(ids, self.exists.shape[1])
        self.routed = counts > 0
        self.scores *= self.decay
        self.sightings[self.scores < FORGOTTEN] = 0
        self.scores += counts
        self.sightings += self.routed

    def observe_prompt(self, ids: Ids) -> None:
        """A prefill chunk: ids [layers, rows, k], one row a token. It touches no score before ``end_prompt``."""
        rows, width = ids.shape[1], self.exists.shape[1]
        age = np.arange(rows - 1, -1, -1.0)[:, None]
        self._prompt_scores *= self.decay**rows
        self._prompt_scores += count_ids(ids, width, self.decay**age)
        seen = count_ids(ids, width)
        self._prompt_sightings += seen
        self.routed = seen > 0

    def end_prompt(self) -> None:
        """Seed from the prompt: its tokens count as if they had just been decoded one by one."""
        self.scores += self._prompt_scores
        self.sightings += self._prompt_sightings
        self.drop_prompt()

    def drop_prompt(self) -> None:
        """Forget a prompt that was given up before its end: its chunks must not seed in the name of the next one."""
        self._prompt_scores[:] = self._prompt_sightings[:] = 0

    def seed_prior(self, counts: npt.ArrayLike, weight: float = 16.0) -> None:
        """Add a profile's routing counts [layers, experts], scaled to weigh as much as ``weight`` tokens.

        A prior is no sighting: it fills free slots, and evicts nobody.
        """
        prior = np.where(self.exists, np.asarray(counts, dtype=np.float64), 0.0)
        total = prior.sum(axis=1, keepdims=True)
        self.scores += np.divide(prior * weight * self.top_k, total, out=np.zeros_like(prior), where=total > 0)

    # -- what follows from it ------------------------------------------------------------------------------

    def plan(self, now: Residents) -> list[Move]:
        """Moves worth making after this step, most valuable first, within the byte budget. Empty when frozen."""
        if self.settings.policy == "frozen":
            return []
        self._allowance = min(self._allowance + self.settings.bytes_per_step, self._most_allowed)
        valued = sorted(self._fills(now) + self._swaps(now), key=lambda pair: -pair[0])
        return self._affordable([move for _, move in valued])

    def fill(self, now: Residents) -> list[Move]:
        """Moves that fill every free slot with the best experts, unseen ones too, whatever it costs: for loading."""
        return [move for _, move in self._fills(now, least=-1.0)]

    def surplus(self, now: Residents, excess: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
        """The ``excess`` [layers] residents of least value that are not pinned, as (layer position, expert)."""
        victims: list[tuple[int, int]] = []
        for position in np.flatnonzero(excess > 0):
            free_to_go = np.flatnonzero(now.resident[position] & ~now.pinned[position])
            order = np.argsort(self.scores[position, free_to_go], kind="stable")
            victims += [(int(position), int(expert)) for expert in free_to_go[order[: excess[position]]]]
        return victims

    def _fills(self, now: Residents, least: float = 0.0) -> list[tuple[float, Move]]:
        found: list[tuple[float, Move]] = []
        for position in np.flatnonzero(now.vacant > 0):
            outside = self.exists[position] & ~now.resident[position] & ~now.in_flight[position]
            scores = np.where(outside, self.scores[position], -np.inf)
            for expert in np.argsort(-scores, kind="stable")[: now.vacant[position]]:
                if scores[expert] > least:
                    found.append((float(scores[expert]), Move(int(position), int(expert))))
        return found

    def _swaps(self, now: Residents) -> list[tuple[float, Move]]:
        known = self.exists & ~now.resident & ~now.in_flight & (self.sightings >= self.settings.min_sightings)
        known &= (now.vacant == 0)[:, None]
        evictable = now.resident & ~now.pinned & ~self.routed
        gains = np.where(known, self.scores, -np.inf)
        losses = np.where(evictable, self.scores, np.inf)
        layers = np.arange(len(gains))
        found: list[tuple[float, Move]] = []
        for _ in range(self.settings.swaps_per_layer_step):
            best, worst = gains.argmax(axis=1), losses.argmin(axis=1)
            gain, loss = gains[layers, best], losses[layers, worst]
            worthy = np.flatnonzero(gain > self.settings.hysteresis * loss)
            if not len(worthy):
                break
            moves = map(Move, worthy.tolist(), best[worthy].tolist(), worst[worthy].tolist())
            found += zip((gain - loss)[worthy].tolist(), moves, strict=True)
            gains[layers, best], losses[layers, worst] = -np.inf, np.inf
        return found

    def _affordable(self, moves: list[Move]) -> list[Move]:
        if not moves:
            return []
        cost = np.cumsum(self.blob_bytes[[move.position for move in moves]], dtype=np.int64)
        count = int(np.searchsorted(cost, self._allowance, side="right"))
        if count:
            self._allowance -= int(cost[count - 1])
        return moves[:count]
