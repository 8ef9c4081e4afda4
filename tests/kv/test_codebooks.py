"""The pinned codebooks against what Lloyd's iteration and Gaussian samples say."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from turbomoe.kv.codebooks import GAUSSIAN_NMSE, POSITIVE_LEVELS, POSITIVE_STEPS, STEPS, levels, thresholds

PUBLISHED_NMSE = {2: 0.1175, 3: 0.0345, 4: 0.0095}


def density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi) if math.isfinite(x) else 0.0


def mass(low: float, high: float) -> float:
    return (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2))) / 2


def lloyd(bits: int, rounds: int = 3000) -> list[float]:
    """Lloyd's iteration on N(0, 1) with exact cell means, from evenly spaced levels."""
    found = [4 * (i + 0.5) / 2**bits - 2 for i in range(2**bits)]
    for _ in range(rounds):
        inner = [(a + b) / 2 for a, b in pairwise(found)]
        borders = [-math.inf, *inner, math.inf]
        cells = pairwise(borders)
        found = [(density(low) - density(high)) / mass(low, high) for low, high in cells]
    return found


def error(table: list[float]) -> float:
    """Mean squared error on N(0, 1) of the nearest of these levels, by exact moments of the cells."""
    borders = [-math.inf, *((a + b) / 2 for a, b in pairwise(table)), math.inf]
    total = 0.0
    for level, (low, high) in zip(table, pairwise(borders), strict=True):
        edges = [x * density(x) if math.isfinite(x) else 0.0 for x in (low, high)]
        second = mass(low, high) + edges[0] - edges[1]
        total += second - 2 * level * (density(low) - density(high)) + level**2 * mass(low, high)
    return total


@pytest.mark.parametrize("bits", POSITIVE_LEVELS)
def test_levels_are_the_fixed_point_of_lloyds_iteration_to_the_nearest_step(bits: int) -> None:
    assert levels(bits) == pytest.approx(lloyd(bits), abs=0.75 * STEPS[bits])
    assert max(POSITIVE_STEPS[bits]) <= (63 if bits == 4 else 127)  # bytes, of 4 bits with an offset of 64


@pytest.mark.parametrize("bits", POSITIVE_LEVELS)
def test_whole_steps_cost_next_to_nothing(bits: int) -> None:
    least = error(lloyd(bits))
    assert error(levels(bits)) == pytest.approx(GAUSSIAN_NMSE[bits], rel=1e-9)
    assert least <= GAUSSIAN_NMSE[bits] <= least * {2: 1.00001, 3: 1.0001, 4: 1.0025}[bits]


@pytest.mark.parametrize("bits", POSITIVE_LEVELS)
def test_error_on_a_million_gaussian_samples(bits: int) -> None:
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    table = torch.tensor(levels(bits), dtype=torch.float64)
    chosen = table[torch.bucketize(x, torch.tensor(thresholds(bits), dtype=torch.float64))]
    nmse = float((x - chosen).square().sum() / x.square().sum())
    assert nmse == pytest.approx(PUBLISHED_NMSE[bits], rel=0.01)
    assert nmse == pytest.approx(GAUSSIAN_NMSE[bits], rel=0.01)


@pytest.mark.parametrize("bits", POSITIVE_LEVELS)
def test_levels_ascend_and_are_symmetric(bits: int) -> None:
    table = levels(bits)
    assert len(table) == 2**bits and len(thresholds(bits)) == 2**bits - 1
    assert table == sorted(set(table))
    assert table == [-level for level in reversed(table)]


def test_two_bit_levels_of_the_paper() -> None:
    assert levels(2) == pytest.approx([-1.51, -0.453, 0.453, 1.51], abs=5e-4)
