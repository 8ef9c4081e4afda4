"""Settings outside their ranges are refused by name, before anything is built from them."""

from __future__ import annotations

from typing import Any

import pytest

from turbomoe.config import ExpertSettings
from turbomoe.errors import SettingsError

RANGES: dict[str, tuple[int, int]] = {
    "min_sightings": (1, 1 << 20),
    "swaps_per_layer_step": (0, 1 << 14),
    "bytes_per_step": (0, 1 << 50),
}


@pytest.mark.parametrize("name", RANGES)
def test_counts_of_the_expert_cache_have_a_range(name: str) -> None:
    low, high = RANGES[name]
    for good in (low, high):
        assert getattr(ExpertSettings(**{name: good}), name) == good
    bad: list[Any] = [low - 1, high + 1, -1, 1.5, float("nan"), "2", None]
    for value in bad:
        with pytest.raises(SettingsError, match=name):
            ExpertSettings(**{name: value})
