"""The simulator against the engine's own cache, count by count, and the bounds against brute force."""

from __future__ import annotations

import json
from collections import OrderedDict
from functools import cache
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.insight.routing import decode_trace, dice_trace, make_trace, model, run_cache
from turbomoe.config import ExpertSettings
from turbomoe.errors import SettingsError
from turbomoe.experts.base import Phase
from turbomoe.insight import simulate as simulator
from turbomoe.insight.simulate import BOUNDS, ENGINE_POLICIES, Outcome, replay, simulate
from turbomoe.insight.trace import END_PROMPT, NOTHING, Trace

DECODE, PREFILL = 1, 0
wanted = st.builds(
    ExpertSettings,
    policy=st.sampled_from(["adaptive", "adaptive", "frozen", "lru"]),
    hysteresis=st.sampled_from([1.0, 1.3, 2.0]),
    half_life=st.sampled_from([2.0, 8.0, 32.0]),
    min_sightings=st.integers(1, 3),
    swaps_per_layer_step=st.integers(0, 3),
    bytes_per_step=st.sampled_from([0, 100, 192, 500, 1 << 30]),
)


@given(wanted, st.integers(1, 3), st.integers(1, 8), st.integers(0, 10_000), st.booleans())
@settings(max_examples=100)
def test_hits_misses_and_uploads_are_the_engine_s_own(
    own: ExpertSettings, layers: int, slots: int, seed: int, seeded: bool
) -> None:
    trace = dice_trace(model(layers), 60, seed, rows=3)
    prior = np.random.default_rng(seed).random((layers, 8)) if seeded else None
    counters = run_cache(trace, own, slots, prior).counters
    tally = replay(trace, own, [slots], prior)
    assert np.sum(tally.hits) == counters.hits[DECODE].sum()
    assert np.sum(tally.routed) - np.sum(tally.hits) == counters.misses[DECODE].sum()
    assert np.sum(tally.uploads) == counters.uploads[DECODE].sum()
    assert tally.prompt_uploads.sum() == counters.uploads[PREFILL].sum()


@given(wanted, st.lists(st.integers(1, 8), min_size=2, max_size=4), st.integers(0, 10_000))
@settings(max_examples=40)
def test_sizes_side_by_side_equal_sizes_one_by_one(own: ExpertSettings, slots: list[int], seed: int) -> None:
    trace = dice_trace(model(), 50, seed, rows=2)
    policy = {"frozen": "static", "lru": "lru", "adaptive": "adaptive"}[own.policy]
    prior = np.arange(16.0).reshape(2, 8)
    together = simulate(trace, [policy], slots, own, prior)
    assert together == [simulate(trace, [policy], [count], own, prior)[0] for count in slots]


def naive_lru(trace: Trace, slots: int) -> tuple[int, int]:
    """(hits, uploads at prompts' ends) of a textbook LRU, expert by expert, that bypasses in prefill."""
    hits = prompt = 0
    for layer in range(len(trace.model.layers)):
        queue: OrderedDict[int, None] = OrderedDict()
        present: set[int] = set()
        for step in trace.steps():
            for row in step.ids[layer]:
                for expert in row.tolist():
                    queue.pop(expert, None)
                    queue[expert] = None
            if step.phase is Phase.DECODE:
                hits += sum(e in present for e in step.ids[layer].reshape(-1).tolist())
            if step.phase is Phase.DECODE or step.after == END_PROMPT:
                now = set(list(queue)[-slots:])
                prompt += len(now - present) * (step.phase is Phase.PREFILL)
                present = now
    return hits, prompt


@given(st.integers(1, 8), st.integers(0, 10_000), st.integers(1, 2))
@settings(max_examples=40)
def test_lru_that_waits_is_the_textbook_s(slots: int, seed: int, rows: int) -> None:
    trace = dice_trace(model(), 50, seed, rows=rows)
    (found,) = simulate(trace, ["lru-wait"], [slots], ExpertSettings())
    assert (found.hits, found.prompt_uploads) == naive_lru(trace, slots)
    assert found.upload_count == found.misses


def best_possible(ids: np.ndarray, experts: int, slots: int) -> int:
    """Most hits of any schedule for one layer, ids [steps, k], by trying all placements."""
    places = [frozenset(c) for c in combinations(range(experts), slots)]

    @cache
    def best(step: int, place: frozenset[int]) -> int:
        if step == len(ids):
            return 0
        used = frozenset(ids[step].tolist())
        reachable = [p for p in places if p <= place | used]
        return len(used & place) + max(best(step + 1, p) for p in reachable)

    return max(best(0, place) for place in places)


@given(st.integers(1, 4), st.integers(0, 10_000))
@settings(max_examples=30)
def test_belady_is_the_best_there_is(slots: int, seed: int) -> None:
    of = model(1, 5)
    trace = dice_trace(of, 12, seed, prompts=False)
    (found,) = simulate(trace, ["belady"], [slots], ExpertSettings())
    assert found.hits == best_possible(trace.ids[:, 0].astype(int), 5, slots)


@given(st.integers(1, 7), st.integers(0, 10_000), st.integers(1, 3))
@settings(max_examples=40)
def test_no_policy_beats_belady_and_the_oracle_is_the_best_fixed_placement(slots: int, seed: int, rows: int) -> None:
    trace = dice_trace(model(), 60, seed, rows=rows)
    prior = np.random.default_rng(seed).random((2, 8))
    found = {o.policy: o.hits for o in simulate(trace, ENGINE_POLICIES + BOUNDS, [slots], ExpertSettings(), prior)}
    assert max(found.values()) == found["belady"]
    counts = np.zeros((2, 8), dtype=int)
    for step in trace.steps():
        if step.phase is Phase.DECODE:
            for layer in range(2):
                np.add.at(counts[layer], step.ids[layer].reshape(-1), 1)
    assert found["oracle"] == np.sort(counts, axis=1)[:, -slots:].sum() >= found["static"]


def test_belady_copies_nothing_that_is_needed_no_sooner() -> None:
    trace = decode_trace(model(1, 4, 2), np.array([[0, 1], [2, 3], [0, 1], [1, 0]]).reshape(-1, 1, 2))
    (found,) = simulate(trace, ["belady"], [1], ExpertSettings())
    assert (found.hits, found.upload_count, found.prompt_uploads) == (3, 0, 1)


def test_all_slots_hit_all_but_the_first_uses() -> None:
    trace = decode_trace(model(1, 4, 1), np.array([0, 1, 0, 1, 2, 0, 2, 3, 3]).reshape(-1, 1, 1))
    found = {o.policy: o for o in simulate(trace, ("lru", "lru-wait", "adaptive", "belady"), [4], ExpertSettings())}
    assert {name: o.misses for name, o in found.items()} == {"lru": 4, "lru-wait": 4, "adaptive": 4, "belady": 0}
    assert {name: o.upload_count for name, o in found.items()} == {"lru": 4, "lru-wait": 4, "adaptive": 4, "belady": 0}
    assert found["belady"].prompt_uploads == 4


def test_a_swap_costs_the_victim_a_step_before_the_newcomer_comes() -> None:
    # 0 is copied after the first step. 1 evicts it after the second, is copied in the third and there in the fourth,
    # which asks for 0; that is copied in the fifth and there in the sixth, which asks for 1.
    sequence = np.array([0, 1, 1, 0, 1, 1]).reshape(-1, 1, 1)
    (found,) = simulate(decode_trace(model(1, 4, 1), sequence), ["lru"], [1], ExpertSettings())
    assert found.hits == 0 and found.upload_count == 3
    (found,) = simulate(decode_trace(model(1, 4, 1), sequence), ["lru-wait"], [1], ExpertSettings())
    assert (found.hits, found.upload_count) == (2, 4)


def test_steady_figures_leave_out_the_first_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = decode_trace(model(1, 4, 1), np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 3]).reshape(-1, 1, 1))
    (found,) = simulate(trace, ["lru-wait"], [3], ExpertSettings())
    assert found.steady_hit_rate is None and found.steady_uploads is None
    assert (found.hit_rate, found.uploads) == (0.6, 0.4)
    monkeypatch.setattr(simulator, "WARM_TOKENS", 5)
    (found,) = simulate(trace, ["lru-wait"], [3], ExpertSettings())
    assert (found.steady_hit_rate, found.steady_uploads) == (0.8, 0.2)


def test_a_prompt_warms_the_cache() -> None:
    of = model(1, 8, 1)
    steps = [(Phase.PREFILL, np.array([4, 5, 4, 5]).reshape(-1, 1, 1), END_PROMPT)]
    steps += [(Phase.DECODE, np.array([[[4 + i % 2]]]), NOTHING) for i in range(6)]
    for policy in ("lru", "lru-wait", "lfu", "adaptive", "belady"):
        (found,) = simulate(make_trace(of, steps), [policy], [2], ExpertSettings())
        assert (found.hits, found.upload_count, found.prompt_uploads) == (6, 0, 2), policy


def test_a_profile_of_the_text_seeds_and_places() -> None:
    of = model(1, 8, 1)
    trace = decode_trace(of, np.array([6, 7] * 5).reshape(-1, 1, 1))
    prior = np.zeros((1, 8))
    prior[0, [6, 7]] = 1
    static, seeded, plain = simulate(trace, ("static", "seeded", "adaptive"), [2], ExpertSettings(), prior)
    assert (static.hits, static.upload_count) == (10, 2)
    assert (seeded.hits, plain.hits) == (9, 8)  # the prior fills the second slot after the first step


@pytest.mark.parametrize(
    ("policies", "slots", "said"),
    [
        (["magic"], [2], "no policy 'magic'"),
        (["static"], [2], "--profile"),
        (["seeded"], [2], "--profile"),
        (["lru"], [0], "between 1 and 8"),
        (["lru"], [9], "between 1 and 8"),
        (["lru"], [], "between 1 and 8"),
    ],
)
def test_what_cannot_be_simulated_is_refused(policies: list[str], slots: list[int], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        simulate(dice_trace(model(), 20, 0), policies, slots, ExpertSettings())


def test_a_trace_without_decode_is_refused() -> None:
    of = model(1, 8, 1)
    with pytest.raises(SettingsError, match="no decode step"):
        simulate(
            make_trace(of, [(Phase.PREFILL, np.zeros((3, 1, 1), int), END_PROMPT)]), ["lru"], [2], ExpertSettings()
        )


def test_outcomes_are_json() -> None:
    found = simulate(dice_trace(model(), 20, 0), ENGINE_POLICIES[:1], [3], ExpertSettings())[0]
    assert isinstance(found, Outcome)
    assert json.loads(json.dumps(found.to_json()))["policy"] == "lru"
