"""Means that turn from page to page: the rotary embedding's own arithmetic, at any distance."""

import pytest
import torch

from turbomoe.kv.pages import PAGE_TOKENS
from turbomoe.kv.turns import angles, page_scores, page_turns, turn

FREQUENCIES = 10_000.0 ** (-torch.arange(0, 32, 2) / 32)


def rope(x: torch.Tensor, frequencies: torch.Tensor, position: int) -> torch.Tensor:
    """Turn x float64 [..., dim] as complex numbers (i, i + r)."""
    r = len(frequencies)
    wave = torch.complex(x[..., :r], x[..., r : 2 * r]) * torch.exp(1j * position * frequencies.double())
    return torch.cat((wave.real, wave.imag, x[..., 2 * r :]), -1)


@pytest.mark.parametrize("r", [0, 5, 16])
@pytest.mark.parametrize("position", [0, 1, 777, 262_143])
def test_turning_is_the_rotary_embedding(r, position):
    x = torch.randn(3, 2, 32)
    turned = turn(x, angles(FREQUENCIES[:r], torch.tensor([position])))
    torch.testing.assert_close(turned, rope(x.double(), FREQUENCIES[:r], position).float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sink", [0, 64, 100])
@pytest.mark.parametrize("page", [0, 3, 4_000])
def test_a_turned_mean_is_the_average_of_a_constant_over_the_page(sink, page):
    mu = torch.randn(2, 32)
    within = turn(mu[:, None], angles(FREQUENCIES, torch.arange(PAGE_TOKENS))).mean(1)
    start = sink + PAGE_TOKENS * page
    average = sum(rope(mu.double(), FREQUENCIES, start + offset) for offset in range(PAGE_TOKENS)) / PAGE_TOKENS
    got = turn(within, page_turns(FREQUENCIES, sink, page + 1)[page])
    torch.testing.assert_close(got, average.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("r", [0, 5, 16])
def test_scores_of_pages_are_dot_products_with_their_means(r):
    q, mean, turns = torch.randn(2, 3, 4, 32), torch.randn(3, 32), page_turns(FREQUENCIES[:r], 64, 7)
    means = torch.stack([turn(mean, row) for row in turns], 1)  # [kv_heads, pages, dim]
    torch.testing.assert_close(page_scores(q, mean, turns), q @ means.mT, rtol=1e-5, atol=1e-5)


def test_what_is_subtracted_does_not_depend_on_the_batch():
    mean, turns = torch.randn(2, 32), page_turns(FREQUENCIES[:13], 64, 50)
    whole = turn(mean[:, None], turns)
    assert all(torch.equal(whole[:, i], turn(mean, turns[i])) for i in range(50))
