"""Figures against numbers worked out by hand, and pictures that are there and are pictures."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.insight.routing import dice_trace, model
from turbomoe.config import ExpertSettings
from turbomoe.errors import SettingsError
from turbomoe.insight import plots
from turbomoe.insight.profile import Profile, RoutingStats
from turbomoe.insight.profile_figures import (
    chance_reuse,
    counts_of,
    coverage,
    effective_experts,
    hottest,
    recall,
    reuse,
    summary,
    transfer,
)
from turbomoe.insight.simulate import BOUNDS, ENGINE_POLICIES, simulate

OF = model(2, 8, 2)


def stats_of(counts: list[list[int]]) -> RoutingStats:
    stats = RoutingStats.zeros(*OF.shape)
    stats.counts[1] = counts
    stats.tokens[1] = stats.counts[1, 0].sum() // 2
    return stats


PROSE = stats_of([[40, 20, 20, 10, 5, 5, 0, 0], [25, 25, 25, 25, 0, 0, 0, 0]])
CODE = stats_of([[0, 0, 5, 5, 10, 20, 20, 40], [0, 0, 0, 0, 25, 25, 25, 25]])


def test_coverage_by_hand() -> None:
    counts = PROSE.counts[1]
    assert coverage(counts, counts, 1).tolist() == [0.4, 0.25]
    assert coverage(counts, counts, 2).tolist() == [0.6, 0.5]
    assert coverage(counts, counts, 8).tolist() == [1.0, 1.0]
    assert coverage(counts, CODE.counts[1], 2).tolist() == [0.05, 0.0]  # experts 7 and 5: the first of equals


def test_coverage_of_nothing_is_nothing() -> None:
    nothing = np.zeros((2, 8), dtype=np.int64)
    assert coverage(nothing, nothing, 4).tolist() == [0, 0] and effective_experts(nothing).tolist() == [1, 1]


@given(st.lists(st.integers(0, 99), min_size=8, max_size=8))
def test_coverage_grows_and_uniform_routing_has_all_experts_in_effect(counts: list[int]) -> None:
    table = np.array([counts, [7] * 8])
    curve = np.array([coverage(table, table, n) for n in range(1, 9)])
    assert (np.diff(curve, axis=0) >= 0).all() and curve[-1, 1] == 1
    assert effective_experts(table)[1] == pytest.approx(8) and effective_experts(table)[0] <= 8 + 1e-9


def test_effective_experts_by_hand() -> None:
    p = np.array([0.4, 0.2, 0.2, 0.1, 0.05, 0.05])
    assert effective_experts(PROSE.counts[1]) == pytest.approx([np.exp(-(p * np.log(p)).sum()), 4])


@pytest.mark.parametrize(("share", "experts", "count"), [(0.05, 64, 3), (0.05, 8, 1), (0.25, 64, 16), (0.5, 5, 2)])
def test_the_hottest_are_at_least_one(share: float, experts: int, count: int) -> None:
    assert hottest(share, experts) == count


def test_transfer_by_hand() -> None:
    table = transfer(Profile(OF, 32.0, {"prose": PROSE, "code": CODE}), 0.25)
    assert table.tolist() == [[pytest.approx(0.55), 0], [pytest.approx(0.025), pytest.approx(0.55)]]


def test_reuse_and_chance_by_hand() -> None:
    PROSE.reuse_hits[:, 0], PROSE.reuse_pairs[:, 0] = [3, 1], [8, 8]
    assert reuse(PROSE)[0] == 0.25 and reuse(PROSE)[1] == 0
    used = PROSE.counts[1] / 50
    assert chance_reuse(PROSE) == pytest.approx((used**2).sum() / 4)


def test_prefill_stands_in_where_nothing_was_decoded() -> None:
    stats = RoutingStats.zeros(*OF.shape)
    stats.counts[0, :, 3], stats.recall_hits[0], stats.recall_pairs[0] = 5, 1, 4
    assert counts_of(stats)[0, 3] == 5 and recall(stats).tolist() == [0.25, 0.25]


def test_a_summary_is_json() -> None:
    found = json.loads(json.dumps(summary(PROSE)))
    assert found["tokens"] == {"prefill": 0, "decode": 50}
    assert found["coverage"]["25%"] == [0.6, 0.5] and found["effective_experts"][1] == 4.0
    assert found["routed_pairs"] == {"prefill": 0, "decode": 200} and len(found["next_gate_recall"]) == 1


# -- pictures ----------------------------------------------------------------------------------------------------


def size_of(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 5000
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def words(figure: Any) -> str:
    """All text of a picture."""
    return " ".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def test_a_profile_s_pictures(tmp_path: Path) -> None:
    both = Profile(OF, 32.0, {"prose": PROSE, "code": CODE})
    made = plots.profile_plots(both, tmp_path / "new" / "folder")
    assert [path.name for path in made] == ["heat-map.png", "coverage.png", "reuse.png", "transfer.png"]
    assert all(min(size_of(path)) > 300 for path in made)
    alone = plots.profile_plots(Profile(OF, 32.0, {"prose": PROSE}), tmp_path)
    assert [path.name for path in alone] == ["heat-map.png", "coverage.png", "reuse.png"]


def test_pictures_say_what_they_show() -> None:
    both = Profile(OF, 32.0, {"prose": PROSE, "code": CODE})
    for make in (plots.heat_map, plots.coverage_curve, plots.reuse_curve, plots.transfer_matrix):
        said = words(make(both))
        assert "dice" in said and "prose" in said and "code" in said and "experts" in said, make.__name__
    assert "55%" in words(plots.transfer_matrix(both))
    outcomes = simulate(dice_trace(OF, 40, 0), ENGINE_POLICIES + BOUNDS, [2, 4], ExpertSettings(), np.ones((2, 8)))
    said = words(plots.slots_curves(outcomes, "the title"))
    assert "the title" in said and "slots per layer" in said
    assert all(f"{name}: {plots.MEANINGS[name]}" in said for name in ENGINE_POLICIES + BOUNDS)
    assert set(plots.MEANINGS) == {*ENGINE_POLICIES, *BOUNDS}


def test_without_matplotlib_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(SettingsError, match=r"pip install -c constraints.txt '.\[plots\]'"):
        plots.require_matplotlib()
