"""Means and rotation around the codec leave attention as it was."""

from __future__ import annotations

import itertools

import pytest
import torch

from turbomoe.kv.hadamard import rotate
from turbomoe.kv.transform import HeadTransform

HEADS, TOKENS, DIM = 3, 20, 64
MATRIX = list(itertools.product([False, True], [False, True]))


def transform(rotated: bool, centred: bool) -> HeadTransform:
    return HeadTransform(rotated, 5 * torch.randn(HEADS, DIM) if centred else None)


@pytest.mark.parametrize(("rotated", "centred"), MATRIX)
def test_scores_differ_by_one_number_a_query_and_head(rotated: bool, centred: bool) -> None:
    t, keys, query = transform(rotated, centred), torch.randn(2, HEADS, TOKENS, DIM), torch.randn(2, HEADS, 1, DIM)
    stored = (t.rotate_query(query).double() * t.forward(keys)).sum(-1)
    offset = 0 if t.mean is None else (query.double() * t.mean[:, None, :]).sum(-1)
    assert torch.allclose(stored + offset, (query.double() * keys).sum(-1), atol=1e-4)


@pytest.mark.parametrize(("rotated", "centred"), MATRIX)
def test_outputs_come_back_without_the_mean(rotated: bool, centred: bool) -> None:
    t, values, weights = transform(rotated, centred), torch.randn(HEADS, TOKENS, DIM), torch.rand(HEADS, 7, TOKENS)
    weights /= weights.sum(-1, keepdim=True)
    out = t.inverse(weights @ t.forward(values))
    assert torch.allclose(out + (0 if t.mean is None else t.mean[:, None, :]), weights @ values, atol=1e-4)


@pytest.mark.parametrize(("rotated", "centred"), MATRIX)
def test_each_vector_is_treated_alone(rotated: bool, centred: bool) -> None:
    t, x = transform(rotated, centred), torch.randn(2, HEADS, TOKENS, DIM).bfloat16()
    together = t.forward(x)
    assert together.dtype == torch.float32
    assert torch.equal(together[0], t.forward(x[0]))
    for token in range(TOKENS):
        assert torch.equal(together[:, :, token : token + 1], t.forward(x[:, :, token : token + 1]))


def test_without_rotation_and_means_nothing_happens() -> None:
    t, x = HeadTransform(rotated=False), torch.randn(HEADS, TOKENS, DIM)
    assert torch.equal(t.forward(x), x) and torch.equal(t.rotate_query(x), x) and torch.equal(t.inverse(x), x)


def test_the_mean_is_subtracted_before_the_rotation() -> None:
    t, x = transform(True, True), torch.randn(HEADS, TOKENS, DIM)
    assert t.mean is not None
    assert torch.equal(t.forward(x), rotate(x - t.mean[:, None, :]))
