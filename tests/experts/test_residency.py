"""The policy alone: its scores against a brute-force oracle, and each rule at its border."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbomoe.config import ExpertSettings
from turbomoe.experts.residency import Move, ResidencyPolicy, Residents, count_ids

E, K, BLOB = 6, 2, 100


def make(layers: int = 1, blob: int = BLOB, **wanted) -> ResidencyPolicy:
    return ResidencyPolicy([E] * layers, [blob] * layers, K, ExpertSettings(**wanted))


def now(policy: ResidencyPolicy, resident=(), in_flight=(), pinned=(), vacant=0) -> Residents:
    """The cache of layer 0 (further layers are empty and full)."""
    flags = [np.zeros(policy.exists.shape, dtype=bool) for _ in range(3)]
    for flag, members in zip(flags, (resident, in_flight, pinned), strict=True):
        flag[0, list(members)] = True
    room = np.zeros(len(policy.exists), dtype=np.int64)
    room[0] = vacant
    return Residents(*flags, room)


def step(policy: ResidencyPolicy, *experts: int) -> None:
    """A decode step of one row in which layer 0 routes to ``experts``."""
    policy.observe(np.array(experts, dtype=np.int32).reshape(1, 1, -1))


def routing(layers: int, rows: int, steps: int, seed: int, missing: float = 0.2) -> list[np.ndarray]:
    """Random ids without duplicates in a row, a share of the rows missing."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(steps):
        ids = np.argsort(rng.random((layers, rows, E)), axis=-1)[:, :, :K].astype(np.int32)
        ids[rng.random((layers, rows)) < missing] = -1
        made.append(ids)
    return made


def brute(history: list[np.ndarray], half_life: float) -> np.ndarray:
    """Sum over all sightings of 2 ** (-age / half_life), one sighting at a time."""
    scores = np.zeros((history[0].shape[0], E))
    for age, ids in enumerate(reversed(history)):
        for layer, rows in enumerate(ids):
            for expert in rows.reshape(-1):
                if expert >= 0:
                    scores[layer, expert] += 2.0 ** (-age / half_life)
    return scores


@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 30), st.integers(0, 999), st.sampled_from([0.5, 3, 32, 500])
)
@settings(max_examples=60)
def test_scores_are_the_decayed_counts(layers: int, rows: int, steps: int, seed: int, half_life: float) -> None:
    policy, history = make(layers, half_life=half_life), routing(layers, rows, steps, seed)
    for ids in history:
        policy.observe(ids)
    assert np.allclose(policy.scores, brute(history, half_life), rtol=1e-12, atol=1e-12)


@given(st.integers(1, 40), st.integers(0, 999), st.lists(st.integers(1, 39), max_size=4))
@settings(max_examples=60)
def test_a_prompt_seeds_as_if_its_tokens_had_been_decoded_whatever_the_chunking(
    tokens: int, seed: int, cuts: list[int]
) -> None:
    prompt = routing(2, tokens, 1, seed)[0]
    policy, edges = make(2), sorted({0, tokens, *(cut for cut in cuts if cut < tokens)})
    for start, end in pairwise(edges):
        policy.observe_prompt(prompt[:, start:end])
        assert not policy.scores.any()  # prefill alone changes nothing
    policy.end_prompt()
    by_token = [prompt[:, t : t + 1] for t in range(tokens)]
    assert np.allclose(policy.scores, brute(by_token, 32.0), rtol=1e-12, atol=1e-12)
    assert np.array_equal(policy.sightings, count_ids(prompt, E))
    policy.end_prompt()  # nothing is left to be counted twice
    assert np.allclose(policy.scores, brute(by_token, 32.0), rtol=1e-12, atol=1e-12)


def test_a_prompt_adds_to_the_scores_of_other_sequences() -> None:
    policy = make()
    for _ in range(5):
        step(policy, 0, 1)
    before = policy.scores.copy()
    policy.observe_prompt(np.full((1, 64, K), 3, dtype=np.int32))
    policy.end_prompt()
    assert np.array_equal(policy.scores[0, :3], before[0, :3]) and policy.scores[0, 3] > 40


def test_count_ids_weighs_and_skips() -> None:
    ids = np.array([[[0, 2], [2, 5]], [[-1, -1], [1, 0]]], dtype=np.int32)
    assert count_ids(ids, E).tolist() == [[1, 0, 2, 0, 0, 1], [1, 1, 0, 0, 0, 0]]
    assert count_ids(ids, E, [[0.5], [2.0]]).tolist() == [[0.5, 0, 2.5, 0, 0, 2.0], [2.0, 2.0, 0, 0, 0, 0]]
    assert count_ids(ids[:, :0], E).shape == (2, E)


def test_free_slots_fill_at_once_with_the_best_seen_even_once() -> None:
    policy = make()
    step(policy, 4, 1)
    step(policy, 1, 5)
    assert policy.plan(now(policy, vacant=2)) == [Move(0, 1), Move(0, 5)]
    assert policy.plan(now(policy, vacant=6)) == [Move(0, 1), Move(0, 5), Move(0, 4)]  # nobody unseen
    assert policy.plan(now(policy, resident=[1], in_flight=[5], vacant=4)) == [Move(0, 4)]


@pytest.mark.parametrize(("score", "swapped"), [(12.0, False), (13.0, False), (13.001, True)])
def test_hysteresis_blocks_up_to_the_ratio_and_admits_above(score: float, swapped: bool) -> None:
    policy = make(hysteresis=1.3)
    policy.scores[0] = [10, 50, score, 0, 0, 0]
    policy.sightings[:] = 9
    assert policy.plan(now(policy, resident=[0, 1])) == ([Move(0, 2, 0)] if swapped else [])


@pytest.mark.parametrize("needed", [1, 2, 3, 5])
def test_evicting_takes_enough_sightings(needed: int) -> None:
    policy = make(min_sightings=needed)
    for seen in range(1, needed + 1):
        step(policy, 2)
        moves = policy.plan(now(policy, resident=[0, 1]))
        assert moves == ([Move(0, 2, 0)] if seen >= needed else []), seen


def test_sightings_are_forgotten_after_four_half_lives() -> None:
    for gap, forgotten in ((11, False), (13, True)):
        policy = make(half_life=3)
        step(policy, 2)
        for _ in range(gap):
            step(policy, 5)
        step(policy, 2)
        assert (policy.sightings[0, 2] == 1) == forgotten


def test_several_sequences_in_one_step_are_one_sighting() -> None:
    policy = make()
    policy.observe(np.full((1, 8, 1), 2, dtype=np.int32))
    assert policy.scores[0, 2] == 8 and policy.sightings[0, 2] == 1
    assert policy.plan(now(policy, resident=[0])) == []


def test_routed_pinned_and_flying_experts_stay() -> None:
    policy = make()
    for _ in range(3):
        step(policy, 4, 5)
    assert policy.plan(now(policy, resident=[0])) == [Move(0, 4, 0)]
    assert policy.plan(now(policy, resident=[0], pinned=[0])) == []
    assert policy.plan(now(policy, resident=[0], in_flight=[4])) == [Move(0, 5, 0)]
    assert policy.plan(now(policy, resident=[0], in_flight=[4, 5])) == []
    policy.scores[0, 4] = 0.01  # worth nothing, yet routed in the step that has just ended
    assert policy.plan(now(policy, resident=[4])) == []


@pytest.mark.parametrize("swaps", [0, 1, 2, 5])
def test_swaps_per_layer_and_step_pair_the_best_with_the_worst(swaps: int) -> None:
    policy = make(layers=2, swaps_per_layer_step=swaps)
    policy.scores[:] = [[1, 2, 3, 10, 30, 20]] * 2
    policy.sightings[:] = 9
    both = now(policy, resident=[0, 1, 2])
    both.resident[1, [0, 1, 2]] = True
    moves = policy.plan(both)
    expected = [Move(layer, best, worst) for best, worst in ((4, 0), (5, 1), (3, 2))[:swaps] for layer in (0, 1)]
    assert moves == expected


def test_the_most_valuable_moves_come_first_across_layers() -> None:
    policy = make(layers=3, bytes_per_step=2 * BLOB)
    for layer, gain in enumerate((5.0, 9.0, 7.0)):
        policy.scores[layer, layer] = gain
    everywhere = now(policy)
    everywhere.vacant[:] = 1
    assert policy.plan(everywhere) == [Move(1, 1), Move(2, 2)]


@given(st.integers(1, 5 * BLOB), st.integers(1, 40), st.integers(0, 999))
@settings(max_examples=60)
def test_bytes_stay_within_the_budget_and_a_small_budget_saves_up(budget: int, steps: int, seed: int) -> None:
    policy, spent = make(layers=3, bytes_per_step=budget), []
    everywhere = now(policy)
    everywhere.vacant[:] = E
    for ids in routing(3, 1, steps, seed, missing=0.0):  # at least 6 experts are always wanted
        policy.observe(ids)
        spent.append(BLOB * len(policy.plan(everywhere)))
    assert max(spent) <= max(budget, BLOB) and sum(spent) <= budget * steps
    saving = -(-BLOB // budget)  # steps until one blob is paid for
    wanted = [max(budget // BLOB, 1) * BLOB if i % saving == 0 else 0 for i in range(1, steps + 1)]
    assert spent == wanted


def test_a_prior_fills_free_slots_and_evicts_nobody() -> None:
    policy = make()
    policy.seed_prior([[0, 0, 300, 100, 0, 0]], weight=16)
    assert policy.scores.tolist() == [[0, 0, 24, 8, 0, 0]]  # 16 tokens of 2 experts
    assert policy.plan(now(policy, vacant=1)) == [Move(0, 2)]
    assert policy.plan(now(policy, resident=[0, 1])) == []
    policy.seed_prior(np.zeros((1, E)))  # a profile that saw nothing
    assert policy.scores.tolist() == [[0, 0, 24, 8, 0, 0]]


def test_experts_that_do_not_exist_are_never_chosen() -> None:
    policy = ResidencyPolicy([2, E], [BLOB, BLOB], K, ExpertSettings())
    policy.seed_prior(np.ones((2, E)))
    everywhere = now(policy)
    everywhere.vacant[:] = E
    assert {m.expert for m in policy.plan(everywhere) if m.position == 0} == {0, 1}
    assert [m for m in policy.fill(everywhere) if m.position == 0] == [Move(0, 0), Move(0, 1)]


def test_frozen_plans_nothing_and_fills_everything() -> None:
    policy = make(policy="frozen")
    policy.seed_prior([[0, 0, 1, 3, 0, 0]])
    for _ in range(5):
        step(policy, 4, 5)
    assert policy.plan(now(policy, resident=[0], vacant=3)) == []
    policy = make(policy="frozen", bytes_per_step=1)
    policy.seed_prior([[0, 0, 1, 3, 0, 0]])
    assert policy.fill(now(policy, vacant=4)) == [Move(0, 3), Move(0, 2), Move(0, 0), Move(0, 1)]


def test_surplus_goes_from_the_least_valued_up_but_for_the_pinned() -> None:
    policy = make()
    policy.scores[0] = [5, 1, 4, 2, 3, 0]
    state = now(policy, resident=[0, 1, 2, 3, 4], pinned=[1])
    assert policy.surplus(state, np.array([0])) == []
    assert policy.surplus(state, np.array([2])) == [(0, 3), (0, 4)]
    assert policy.surplus(state, np.array([9])) == [(0, 3), (0, 4), (0, 2), (0, 0)]


def test_the_policy_knows_no_clock_and_no_device() -> None:
    module = sys.modules[ResidencyPolicy.__module__]
    source = Path(str(module.__file__)).read_text()
    assert not {"torch", "time", "random"} & {
        line.split()[1] for line in source.splitlines() if line.startswith("import")
    }
    assert not {"torch", "time", "random"} & set(vars(module))
