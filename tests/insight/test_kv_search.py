"""The search among KV types against judges whose tables are known, sensible ones and absurd ones."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbomoe.insight.kv_search import ANCHOR, BUDGET, EXACT, MOST_PASSES, OVER_ANCHOR, Found, Measured, Pair, Search

AUTO = "auto"
LADDER = ("q8_0", "tq4", "tq3", "tq2")  # any would do: names mean nothing to the search
BITS = {"bf16": 16.0, "q8_0": 8.5, "tq4": 4.25, "tq3": 3.25, "tq2": 2.25}
OF = 1000
GIVEN_UP = 250  # tokens after which the fake judge looks whether a pair can still make it


class FakeJudge:
    """Answers from a table; gives up as the real one does."""

    def __init__(self, table: Mapping[Pair, float]) -> None:
        self.table = table
        self.rounds: list[dict[Pair, float]] = []

    def __call__(self, limits: Mapping[Pair, float]) -> dict[Pair, Measured]:
        self.rounds.append(dict(limits))
        return {pair: self._one(pair, limit) for pair, limit in limits.items()}

    def _one(self, pair: Pair, limit: float) -> Measured:
        early = Measured(self.table[pair], GIVEN_UP, OF)
        return early if early.at_least > limit else Measured(self.table[pair], OF, OF)

    @property
    def pairs(self) -> list[Pair]:
        return [pair for limits in self.rounds for pair in limits]


def all_pairs() -> list[Pair]:
    names = [EXACT, *LADDER]
    return [(key, value) for key in names for value in names]


def additive(keys: Mapping[str, float], values: Mapping[str, float]) -> dict[Pair, float]:
    """KL as a sum of what each side costs."""
    return {(k, v): keys[k] + values[v] for k, v in all_pairs()}


EASY = {"bf16": 0.0, "q8_0": 0.0001, "tq4": 0.001, "tq3": 0.004, "tq2": 0.03}
VALUES = {"bf16": 0.0, "q8_0": 0.0001, "tq4": 0.0005, "tq3": 0.002, "tq2": 0.008}
BIASED = {"bf16": 0.0, "q8_0": 0.0005, "tq4": 0.36, "tq3": 0.5, "tq2": 1.4}  # keys of Qwen2.5's kind


def search(
    table: Mapping[Pair, float], wish: Pair = (AUTO, AUTO), *, asked: float | None = None,
    ladder: tuple[str, ...] = LADDER, known: dict[Pair, Measured] | None = None,
) -> tuple[Found, FakeJudge]:  # fmt: skip
    judge = FakeJudge(table)
    return Search(wish, ladder, BITS, asked, {} if known is None else known, judge).run(), judge


def test_a_model_that_bears_few_bits_gets_narrower_values_than_keys() -> None:
    found, judge = search(additive(EASY, VALUES))
    assert found.pair == ("tq3", "tq2") and found.budget == BUDGET
    assert [len(limits) for limits in judge.rounds] == [4, 2], "the ladder, then around tq3"
    assert judge.pairs[4:] == [("tq3", "tq2"), ("tq2", "tq3")]


def test_keys_that_cannot_be_narrowed_stay_wide_while_values_shrink() -> None:
    found, judge = search(additive(BIASED, VALUES))
    assert found.pair == ("q8_0", "tq2")
    assert found.tried[("tq4", "tq4")].tokens == GIVEN_UP, "hopeless pairs are given up"
    assert found.tried[("q8_0", "q8_0")].tokens == OF


def test_values_that_cannot_be_narrowed_stay_wide_while_keys_shrink_a_step() -> None:
    found, _ = search(additive(VALUES, BIASED))
    assert found.pair == ("tq4", "q8_0")


def test_the_last_rung_leaves_nothing_to_try() -> None:
    found, judge = search(additive(VALUES, VALUES), asked=0.05)
    assert found.pair == ("tq2", "tq2") and len(judge.rounds) == 1


def test_the_budget_is_the_larger_of_its_two_parts_unless_asked_for() -> None:
    noisy = {pair: 0.05 if pair == ANCHOR else 0.06 for pair in all_pairs()}
    found, judge = search(noisy)
    assert found.budget == pytest.approx(OVER_ANCHOR * 0.05)
    assert found.pair == ("tq2", "tq2"), "0.06 is within 0.075 everywhere"
    assert judge.rounds[0][ANCHOR] == inf, "the anchor is never given up"
    assert search(noisy, asked=0.055)[0].pair == ANCHOR
    assert search(noisy, asked=0.01)[0].pair == (EXACT, EXACT)


def test_pairs_given_up_too_early_get_another_go() -> None:
    """q8_0 costs 0.3 here, so that 0.4 is within 1.5 times that; at first 0.4 looked hopeless."""
    found, judge = search({pair: 0.3 if pair == ANCHOR else 0.4 for pair in all_pairs()})
    assert found.pair == ("tq2", "tq2")
    assert set(judge.rounds[1]) == {("tq4", "tq4"), ("tq3", "tq3"), ("tq2", "tq2")}


def test_bf16_where_even_eight_bits_are_too_few() -> None:
    table = {pair: 0.0 if pair == (EXACT, EXACT) else 9.0 for pair in all_pairs()}
    found, _ = search(table, asked=0.02)
    assert found.pair == (EXACT, EXACT) and found.pair not in found.tried
    table[(EXACT, "tq4")] = 0.01
    assert search(table, asked=0.02)[0].pair == (EXACT, "tq4"), "keys exact, values not"


def test_a_given_side_is_kept_and_the_other_chosen() -> None:
    found, judge = search(additive(EASY, VALUES), ("tq4", AUTO))
    assert found.pair == ("tq4", "tq2")
    assert set(judge.pairs) == {ANCHOR, *(("tq4", name) for name in LADDER)} and len(judge.rounds) == 1
    assert search(additive(EASY, VALUES), (AUTO, "bf16"))[0].pair == ("tq3", "bf16")
    assert search(additive(BIASED, VALUES), ("tq4", AUTO))[0].pair == ("tq4", EXACT), "nothing helps those keys"


def test_what_is_known_is_not_measured_again() -> None:
    known: dict[Pair, Measured] = {}
    table = additive(EASY, VALUES)
    first, _ = search(table, known=known)
    again, judge = search(table, known=known)
    assert again == first and judge.rounds == []
    tighter, judge = search(table, asked=0.005, known=known)
    assert tighter.pair == search(table, asked=0.005)[0].pair
    assert not set(judge.pairs) & {("q8_0", "q8_0"), ("tq4", "tq4"), ("tq3", "tq3"), ("tq2", "tq2")}


def test_what_was_given_up_is_measured_again_where_that_matters() -> None:
    known: dict[Pair, Measured] = {}
    table = additive(BIASED, VALUES)
    search(table, known=known)
    assert known[("tq4", "tq4")].tokens == GIVEN_UP
    found, judge = search(table, asked=0.5, known=known)
    assert ("tq4", "tq4") in judge.pairs and found.pair == ("tq4", "tq2")


def test_a_pair_that_failed_never_wins_and_is_not_measured_again() -> None:
    """However small its mean was up to there, and though it stopped short of the end."""
    table = additive(EASY, VALUES)
    known = {("tq3", "tq3"): Measured(0.0, 10, OF, failed=True), ANCHOR: Measured(9.0, OF, OF, failed=True)}
    found, judge = search(table, known=dict(known))
    assert found.pair == ("tq4", "tq2") and found.budget == BUDGET, "nor does it make a budget"
    assert not set(judge.pairs) & set(known)


def test_without_q8_0_the_budget_is_the_constant() -> None:
    found, judge = search(additive(EASY, VALUES), ladder=("tq4", "tq3", "tq2"))
    assert found.budget == BUDGET and ANCHOR not in judge.pairs and found.pair == ("tq3", "tq2")


def test_steps_of_half_a_bit() -> None:
    """The trellis' ladder: around 3 bits there are two narrower types for the values."""
    ladder = ("q8_0", "tcq4", "tcq3", "tcq2.5", "tcq2")
    keys = dict(zip((EXACT, *ladder), (0, 0.0001, 0.001, 0.003, 0.03, 0.1), strict=True))
    values = dict(zip((EXACT, *ladder), (0, 0.0001, 0.0005, 0.001, 0.002, 0.03), strict=True))
    table = {(k, v): keys[k] + values[v] for k in keys for v in values}
    bits = dict(zip((EXACT, *ladder), (16, 8.5, 4.125, 3.125, 2.625, 2.125), strict=True))
    judge = FakeJudge(table)
    found = Search((AUTO, AUTO), ladder, bits, None, {}, judge).run()
    assert found.pair == ("tcq3", "tcq2.5")
    assert judge.pairs[5:] == [("tcq3", "tcq2.5"), ("tcq3", "tcq2"), ("tcq2.5", "tcq3")]


kls = st.one_of(st.floats(0, 0.06), st.floats(0, 3))
anything = st.fixed_dictionaries(dict.fromkeys(all_pairs(), kls))
steps = st.lists(kls, min_size=5, max_size=5).map(lambda steps: dict(zip([EXACT, *LADDER], sorted(steps), strict=True)))
sensible = st.builds(additive, steps, steps)
wishes = st.tuples(st.sampled_from([AUTO, *LADDER]), st.sampled_from([AUTO, *LADDER])).filter(lambda wish: AUTO in wish)


@given(st.one_of(anything, sensible), wishes, st.one_of(st.none(), st.floats(1e-4, 1)))
def test_whatever_the_table(table: dict[Pair, float], wish: Pair, asked: float | None) -> None:
    found, judge = search(table, wish, asked=asked)
    expected = max(BUDGET, OVER_ANCHOR * table[ANCHOR]) if asked is None else asked
    assert found.budget == expected
    within = {pair for pair in found.tried if table[pair] <= expected and fits(pair, wish)}
    if not within:
        assert found.pair == tuple(EXACT if side == AUTO else side for side in wish)
        return
    assert found.pair in within
    assert rate(found.pair) == min(map(rate, within))
    best = [pair for pair in within if rate(pair) == rate(found.pair)]
    assert table[found.pair] == min(table[pair] for pair in best)


@given(st.one_of(anything, sensible), st.one_of(st.none(), st.floats(1e-4, 1)))
def test_keys_are_far_above_values_only_with_a_reason(table: dict[Pair, float], asked: float | None) -> None:
    found, _ = search(table, asked=asked)
    key, value = found.pair
    if BITS[key] - BITS[value] <= 1:
        return
    over = [pair for pair in found.tried if table[pair] > found.budget]
    assert any(BITS[k] < BITS[key] and BITS[v] >= BITS[value] for k, v in over)


@given(st.one_of(anything, sensible), wishes, st.one_of(st.none(), st.floats(1e-4, 1)))
def test_few_passes_each_pair_once_unless_it_was_given_up(table, wish: Pair, asked: float | None) -> None:
    found, judge = search(table, wish, asked=asked)
    assert len(judge.rounds) <= MOST_PASSES and len(found.tried) <= 2 * len(LADDER) + 1
    assert set(judge.pairs) == set(found.tried)
    again = [pair for pair in judge.pairs if judge.pairs.count(pair) > 1]
    assert all(GIVEN_UP / OF * table[pair] > BUDGET for pair in again)


def fits(pair: Pair, wish: Pair) -> bool:
    return all(side in (AUTO, name) for side, name in zip(wish, pair, strict=True))


def rate(pair: Pair) -> float:
    return BITS[pair[0]] + BITS[pair[1]]


@pytest.mark.parametrize(("error", "passes"), [(0.0, True), (0.0015, True), (0.0025, False), (0.02, False)])
def test_a_pair_passes_with_two_standard_errors_to_spare(error: float, passes: bool) -> None:
    assert Measured(0.016, OF, OF, error=error).passes(0.02) is passes
    assert not Measured(0.016, OF, OF, failed=True, error=error).passes(0.02)
