"""LRU as a residency policy: order of use, against a plain list of who was used when."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbomoe.config import ExpertSettings
from turbomoe.errors import SettingsError
from turbomoe.experts.recency import RecencyPolicy, make_policy
from turbomoe.experts.residency import Move, ResidencyPolicy, Residents

E, K = 8, 2
steps_of = st.lists(st.lists(st.integers(0, E - 1), min_size=K, max_size=K, unique=True), min_size=1, max_size=40)


def make(**wanted) -> ResidencyPolicy:
    return make_policy([E], [100], K, ExpertSettings(policy="lru", **wanted))


def ids(*rows: list[int]) -> np.ndarray:
    return np.array(rows, dtype=np.int32)[None]


def settle(policy: ResidencyPolicy, slots: int, resident: set[int]) -> tuple[set[int], int]:
    """Carry out what the policy plans, at once, until it plans no more: who is in, and how many copies it took."""
    copies = 0
    for _ in range(3 * E):
        flags = np.zeros((1, E), dtype=bool)
        flags[0, list(resident)] = True
        none = np.zeros_like(flags)
        moves = policy.plan(Residents(flags, none, none, np.array([slots - len(resident)])))
        if not moves:
            return resident, copies
        for move in moves:
            assert move.expert not in resident
            resident = resident - {move.victim} | {move.expert}
            copies += 1
    raise AssertionError("the policy never comes to rest")


def last_use(steps: list[list[int]]) -> dict[int, int]:
    return {expert: moment for moment, step in enumerate(steps) for expert in step}


@given(steps_of, st.integers(K, E))
@settings(max_examples=80)
def test_the_slots_hold_what_was_used_last(steps: list[list[int]], slots: int) -> None:
    policy, resident = make(), set[int]()
    for moment, step in enumerate(steps):
        policy.observe(ids(step))
        missed = len(set(step) - resident)
        resident, copies = settle(policy, slots, resident)
        assert copies == missed  # every miss is copied, and nothing else
        used = last_use(steps[: moment + 1])
        kept, lost = [used[e] for e in resident], [used[e] for e in used if e not in resident]
        assert len(resident) == min(slots, len(used)) and (not lost or min(kept) >= max(lost))


@given(steps_of, st.lists(st.integers(1, 39), max_size=4), st.integers(1, E))
@settings(max_examples=50)
def test_a_prompt_counts_token_by_token_whatever_the_chunking(
    prompt: list[list[int]], cuts: list[int], slots: int
) -> None:
    policy, edges = make(), sorted({0, len(prompt), *(cut for cut in cuts if cut < len(prompt))})
    before = policy.scores.copy()
    for start, end in pairwise(edges):
        policy.observe_prompt(ids(*prompt[start:end]))
        assert np.array_equal(policy.scores, before)
    policy.end_prompt()
    one_by_one = make()
    for step in prompt:
        one_by_one.observe(ids(step))
    assert np.array_equal(policy.scores, one_by_one.scores)
    used = last_use(prompt)
    resident, _ = settle(policy, slots, set(range(min(slots, E))))
    assert sum(used.get(e, -1) for e in resident) == sum(sorted([used.get(e, -1) for e in range(E)])[-slots:])


def test_a_dropped_prompt_leaves_the_order_as_it_was() -> None:
    policy = make()
    policy.observe(ids([1, 2]))
    before = policy.scores.copy()
    policy.observe_prompt(ids([5, 6], [6, 7]))
    policy.drop_prompt()
    policy.end_prompt()
    assert np.array_equal(policy.scores, before)


def test_a_prior_orders_only_what_was_never_used() -> None:
    policy = make()
    policy.seed_prior(np.array([[0, 1, 2, 3, 4, 5, 6, 7]]))
    assert settle(policy, 3, set())[0] == {5, 6, 7}
    policy.observe(ids([0, 1]))
    assert settle(policy, 3, {5, 6, 7}) == ({0, 1, 7}, 2)


def test_missing_rows_use_nothing() -> None:
    policy = make()
    policy.observe(ids([-1, -1], [3, -1]))
    policy.observe_prompt(ids([-1, 4]))
    policy.end_prompt()
    assert np.flatnonzero(policy.scores).tolist() == [3, 4]


def test_the_budget_of_bytes_holds_for_lru_too() -> None:
    policy = make(bytes_per_step=100)
    policy.observe(ids([1, 2]))
    flags = np.zeros((1, E), dtype=bool)
    assert policy.plan(Residents(flags, flags, flags, np.array([4]))) == [Move(0, 1)]


@pytest.mark.parametrize(
    ("name", "kind"), [("adaptive", ResidencyPolicy), ("frozen", ResidencyPolicy), ("lru", RecencyPolicy)]
)
def test_names_of_policies(name: str, kind: type) -> None:
    assert type(make_policy([E], [100], K, ExpertSettings(policy=name))) is kind


def test_other_names_are_refused_with_those_that_exist() -> None:
    with pytest.raises(SettingsError, match="adaptive, frozen, lru"):
        ExpertSettings(policy="fifo")
