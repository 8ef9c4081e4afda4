"""A negative result, kept where it can be checked: the QJL bit of TurboQuant_prod makes attention worse.

TurboQuant_prod (arXiv 2504.19874, algorithm 2) spends one of its b bits on the sign of a random projection of what
b - 1 bits left over, which makes dot products unbiased. Softmax does not need them unbiased, it needs them precise.
"""

from __future__ import annotations

import math

import pytest
import torch

from turbomoe.kv.codebooks import levels
from turbomoe.kv.codecs import make_codec
from turbomoe.kv.hadamard import rotate

DIM, KEYS, QUERIES = 128, 2048, 128
LOGIT_STD = 2.0
# Mean KL divergence of the attention weights, as first measured with 4,096 keys: bits -> (Lloyd-Max, with QJL).
MEASURED = {2: (0.235, 1.083), 3: (0.0665, 0.363), 4: (0.0182, 0.108)}
ONE_BIT = [-math.sqrt(2 / math.pi), math.sqrt(2 / math.pi)]


def turboquant_prod(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Vectors [n, DIM] through TurboQuant_prod and back: ``bits - 1`` of Lloyd-Max and one QJL sign a coordinate."""
    norm = x.norm(dim=-1, keepdim=True)
    unit = x / norm
    table = torch.tensor(levels(bits - 1) if bits > 2 else ONE_BIT) / math.sqrt(DIM)
    coarse = table[(unit[..., None] - table).abs().argmin(-1)]
    left = unit - coarse
    projection = torch.randn(DIM, DIM)
    signs = torch.where(left @ projection.T >= 0, 1.0, -1.0)
    fine = math.sqrt(math.pi / 2) / DIM * left.norm(dim=-1, keepdim=True) * (signs @ projection)
    return norm * (coarse + fine)


def attention_divergence(queries: torch.Tensor, keys: torch.Tensor, stored: torch.Tensor) -> float:
    """Mean KL divergence, in nats, of the attention over ``stored`` keys from that over ``keys``."""
    exact, approximate = (torch.log_softmax(queries @ k.T, -1) for k in (keys, stored))
    return float((exact.exp() * (exact - approximate)).sum(-1).mean())


@pytest.mark.parametrize("bits", MEASURED)
def test_qjl_loses_at_equal_bits(bits: int) -> None:
    keys, queries = rotate(torch.randn(KEYS, DIM)), torch.randn(QUERIES, DIM)
    queries *= LOGIT_STD / queries.norm(dim=-1, keepdim=True)
    codec = make_codec(f"tq{bits}", DIM)
    plain = attention_divergence(queries, keys, codec.decode(codec.encode(keys)))
    with_qjl = attention_divergence(queries, keys, turboquant_prod(keys, bits))
    assert (plain, with_qjl) == pytest.approx(MEASURED[bits], rel=0.15)
    assert with_qjl >= 3 * plain


def test_the_qjl_of_this_file_is_unbiased_as_the_paper_says() -> None:
    """So that the comparison is with the method, not with a mistake: the mean over many projections is right."""
    x, q = torch.randn(1, DIM), torch.randn(DIM)
    dots = torch.stack([turboquant_prod(x, 2)[0] @ q for _ in range(1000)])
    standard_error = float(dots.std()) / math.sqrt(len(dots))
    assert float(dots.mean()) == pytest.approx(float(x[0] @ q), abs=4 * standard_error)
    assert standard_error < 0.05 * float(x.norm() * q.norm()) / math.sqrt(DIM)
