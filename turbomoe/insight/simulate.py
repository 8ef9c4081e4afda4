"""Replays a trace through cache policies: hit rates and uploads against slots, without the model.

The policies that the engine can run (``lru``, ``lfu``, ``adaptive``, ``seeded``, ``static``) are the engine's own code
with the engine's own delays: a copy into a free slot is usable in the next step, a swap's victim is gone in the next
step and the newcomer is there in the one after. The bounds (``simulate_bounds.py``) know the future or wait for
copies, and pay no delay. Arms of several sizes run side by side as if they were further layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from turbomoe.config import ExpertSettings
from turbomoe.errors import SettingsError
from turbomoe.experts.base import Phase
from turbomoe.experts.recency import make_policy
from turbomoe.experts.residency import Move, Residents
from turbomoe.insight.trace import DROP_PROMPT, END_PROMPT, Step, Trace

WARM_TOKENS = 256  # decode rows that the steady figures leave out
NEEDS_PROFILE = ("seeded", "static")
ENGINE_POLICIES = ("lru", "lfu", "adaptive", *NEEDS_PROFILE)
BOUNDS = ("lru-wait", "oracle", "belady")

Counts = npt.NDArray[np.int64]
NO_MOVES: Counts = np.empty((3, 0), dtype=np.int64)  # rows: layer position, expert, victim


@dataclass(frozen=True)
class Outcome:
    """What one policy did with ``slots`` per layer in the decode steps of a trace; hits are (row, k) pairs.

    ``uploads`` leaves out ``prompt_uploads``, those at the beginning and at prompts' ends. The steady figures leave
    out the first ``WARM_TOKENS`` decode rows; they are None for a trace that has no more.
    """

    policy: str
    slots: int
    hit_rate: float
    uploads: float  # per layer and token
    steady_hit_rate: float | None
    steady_uploads: float | None
    hits: int
    misses: int
    upload_count: int
    prompt_uploads: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Tally:
    """Per decode step: its rows, and [arms] hits and uploads, summed over layers; ``routed`` pairs are the same for
    all arms.
    """

    rows: list[int]
    routed: list[int]
    hits: list[Counts]
    uploads: list[Counts]
    prompt_uploads: Counts

    @classmethod
    def empty(cls, arms: int) -> Tally:
        return cls([], [], [], [], np.zeros(arms, dtype=np.int64))

    def outcomes(self, policy: str, slots: Sequence[int], layers: int) -> list[Outcome]:
        """One outcome per arm."""
        arms = len(slots)
        hits, uploads = (np.array(part, dtype=np.int64).reshape(-1, arms) for part in (self.hits, self.uploads))
        rows, routed = np.array(self.rows, dtype=np.int64), np.array(self.routed, dtype=np.int64)
        late = np.cumsum(rows) > WARM_TOKENS
        made = []
        for arm, count in enumerate(slots):
            steady = late.any()
            made.append(
                Outcome(
                    policy=policy,
                    slots=count,
                    hit_rate=_share(hits[:, arm].sum(), routed.sum()),
                    uploads=_share(uploads[:, arm].sum(), rows.sum() * layers),
                    steady_hit_rate=_share(hits[late, arm].sum(), routed[late].sum()) if steady else None,
                    steady_uploads=_share(uploads[late, arm].sum(), rows[late].sum() * layers) if steady else None,
                    hits=int(hits[:, arm].sum()),
                    misses=int(routed.sum() - hits[:, arm].sum()),
                    upload_count=int(uploads[:, arm].sum()),
                    prompt_uploads=int(self.prompt_uploads[arm]),
                )
            )
        return made


def _share(part: Any, whole: Any) -> float:
    return float(part) / float(whole) if whole else 0.0


class Placement:
    """The slots of some layers as the promotion protocol moves them when copies end before the next step."""

    def __init__(self, experts: int, quota: Counts) -> None:
        self.quota = quota
        self.resident = np.zeros((len(quota), experts), dtype=bool)
        self.in_flight = np.zeros_like(self.resident)
        self.uploads = np.zeros(len(quota), dtype=np.int64)
        self._copying = self._waiting = NO_MOVES  # the waiting ones' victims are gone, their copies start next
        self._no_pins = np.zeros_like(self.resident)

    def advance(self) -> None:
        """The boundary between two steps: what was copied lands, what waited for readers starts."""
        positions, experts, _ = self._copying
        self.resident[positions, experts] = True
        self.in_flight[positions, experts] = False
        self._copying, self._waiting = self._waiting, NO_MOVES
        np.add.at(self.uploads, self._copying[0], 1)

    def apply(self, moves: Sequence[Move]) -> None:
        """Start moves: fills at once, swaps by giving up their victims."""
        if not moves:
            return
        wanted = np.array(moves, dtype=np.int64).T
        positions, experts, victims = wanted
        self.in_flight[positions, experts] = True
        fills = victims < 0
        np.add.at(self.uploads, positions[fills], 1)
        self._copying = np.concatenate([self._copying, wanted[:, fills]], axis=1)
        self._waiting = np.concatenate([self._waiting, wanted[:, ~fills]], axis=1)
        self.resident[positions[~fills], victims[~fills]] = False

    def seen(self) -> Residents:
        """What the policy may know."""
        vacant = self.quota - (self.resident | self.in_flight).sum(axis=1)
        return Residents(self.resident, self.in_flight, self._no_pins, vacant)


def policy_settings(policy: str, settings: ExpertSettings, top_k: int) -> ExpertSettings:
    """The engine settings that an arm stands for."""
    if policy == "lfu":  # counts that never decay, and nothing that holds a newcomer back
        return replace(
            settings, policy="adaptive", half_life=1e15, hysteresis=1.0, min_sightings=1, swaps_per_layer_step=top_k
        )
    return replace(settings, policy={"static": "frozen", "lru": "lru"}.get(policy, "adaptive"))


def simulate(
    trace: Trace,
    policies: Sequence[str],
    slots: Sequence[int],
    settings: ExpertSettings,
    prior: npt.ArrayLike | None = None,
) -> list[Outcome]:
    """Every policy at every number of slots per layer. ``prior`` [layers, experts] is a profile's.

    Raises ``SettingsError`` for an unknown policy, one that needs a profile without one, or slots out of range.
    """
    _check(trace, policies, slots, prior)
    outcomes: list[Outcome] = []
    for policy in policies:
        if policy in BOUNDS:
            from turbomoe.insight.simulate_bounds import bound

            outcomes += bound(policy, trace, slots)
            continue
        own = policy_settings(policy, settings, trace.model.top_k)
        seed = prior if policy in NEEDS_PROFILE else None
        for group in _side_by_side(trace, slots, own):
            outcomes += replay(trace, own, group, seed).outcomes(policy, group, len(trace.model.layers))
    return outcomes


def replay(trace: Trace, settings: ExpertSettings, slots: Sequence[int], prior: npt.ArrayLike | None = None) -> Tally:
    """The engine's policy over a trace, one arm for each of ``slots``. They share the budget of bytes per step."""
    model, arms = trace.model, len(slots)
    policy = make_policy(model.experts * arms, model.blob_bytes * arms, model.top_k, settings)
    if prior is not None:
        policy.seed_prior(np.tile(np.asarray(prior), (arms, 1)))
    quota = np.minimum(np.repeat(slots, len(model.layers)), np.tile(model.experts, arms)).astype(np.int64)
    place, tally = Placement(model.shape[1], quota), Tally.empty(arms)
    where = np.arange(len(quota))[:, None, None]
    for step in trace.steps(arms):
        before = place.uploads.copy()
        place.advance()
        if settings.policy == "frozen":
            place.apply(policy.fill(place.seen()))
            place.advance()
        if step.phase is Phase.PREFILL:
            policy.observe_prompt(step.ids)
        else:
            found = place.resident[where, step.ids] & (step.ids >= 0)
            tally.hits.append(_by_arm(found.sum(axis=(1, 2)), arms))
            policy.observe(step.ids)
            place.apply(policy.plan(place.seen()))
        if step.after == END_PROMPT:
            policy.end_prompt()
            place.apply(policy.plan(place.seen()))
        elif step.after == DROP_PROMPT:
            policy.drop_prompt()
        _count(tally, step, _by_arm(place.uploads - before, arms))
    return tally


def _count(tally: Tally, step: Step, uploads: Counts) -> None:
    """Note the uploads around a step whose layers come once for each arm."""
    if step.phase is Phase.PREFILL:
        tally.prompt_uploads += uploads
        return
    tally.rows.append(step.ids.shape[1])
    tally.routed.append(int(np.count_nonzero(step.ids >= 0)) // len(uploads))
    tally.uploads.append(uploads)


def _by_arm(by_position: npt.NDArray[Any], arms: int) -> Counts:
    total: Counts = by_position.reshape(arms, -1).sum(axis=1, dtype=np.int64)
    return total


def _side_by_side(trace: Trace, slots: Sequence[int], settings: ExpertSettings) -> list[Sequence[int]]:
    """Arms that may share a policy: all, if together they can never reach the budget of bytes per step."""
    everything = len(slots) * sum(e * b for e, b in zip(trace.model.experts, trace.model.blob_bytes, strict=True))
    return [slots] if everything <= settings.bytes_per_step else [[count] for count in slots]


def _check(trace: Trace, policies: Sequence[str], slots: Sequence[int], prior: npt.ArrayLike | None) -> None:
    most = max(trace.model.experts)
    for policy in policies:
        if policy not in ENGINE_POLICIES + BOUNDS:
            raise SettingsError(f"There is no policy {policy!r}", fix=f"Known: {', '.join(ENGINE_POLICIES + BOUNDS)}")
        if policy in NEEDS_PROFILE and prior is None:
            raise SettingsError(f"The policy {policy} needs a profile", fix="Give one with --profile FILE")
    if not slots or not all(1 <= count <= most for count in slots):
        raise SettingsError(f"Slots per layer must be between 1 and {most}, the experts of a layer")
    if trace.decode_rows == 0:
        raise SettingsError("The trace has no decode step to simulate", fix="Take one with turbomoe profile --trace")
