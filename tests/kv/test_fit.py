"""The fit of means and scales: what it finds, whom it listens to, and what it refuses."""

import pytest
import torch

from turbomoe.errors import IntegrityError
from turbomoe.kv.codecs import make_codec
from turbomoe.kv.fit import TransformFit
from turbomoe.kv.hadamard import rotate, unrotate
from turbomoe.kv.means import KVMeans, MeansError
from turbomoe.kv.turns import angles, page_turns, turn

N, HEADS, GROUP, DIM = 512, 2, 3, 64
FREQUENCIES = 1e6 ** (-torch.arange(0, DIM, 2) / DIM)


def queries(seed: int = 0, n: int = N) -> torch.Tensor:
    return torch.randn(1, HEADS * GROUP, n, DIM, generator=torch.Generator().manual_seed(seed))


def keys(seed: int = 1, n: int = N) -> torch.Tensor:
    return torch.randn(1, HEADS, n, DIM, generator=torch.Generator().manual_seed(seed))


def fit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunk: int = N, scale: float = 0.05) -> KVMeans:
    found = TransformFit(q.shape[2])
    for parts in zip(*(x.split(chunk, 2) for x in (q, k, v)), strict=True):
        found.add(0, *parts, scale)
    return found.finish("test", FREQUENCIES)


def biased(first: int, n: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys with a large constant that the rotary embedding has turned, from position ``first`` on, and the constant."""
    mu = 30 * torch.randn(HEADS, DIM, generator=torch.Generator().manual_seed(9))
    return keys(n=n) + turn(mu[:, None], angles(FREQUENCIES, first + torch.arange(n))), mu


def test_a_constant_that_turns_is_found_and_followed_far_beyond_the_text():
    k, mu = biased(0)
    means = fit(queries(), k, keys(2))
    want = turn(mu[:, None], angles(FREQUENCIES, torch.arange(64))).mean(1)
    torch.testing.assert_close(means.keys[0], want, rtol=0, atol=1.0)  # noise of 448 tokens, against 30
    far, _ = biased(200_000, 64)
    slow = FREQUENCIES < 1e-3  # those that hardly turn within a page
    left = far[0] - turn(means.keys[0][:, None], angles(FREQUENCIES, torch.tensor([200_000])))
    assert left[..., slow.repeat(2)].std() < 1.5 and far[0][..., slow.repeat(2)].std() > 20


def test_tokens_weigh_as_much_as_the_attention_that_they_get():
    q, k, v = queries(), keys(), keys(2)
    looked_at = torch.arange(N) % 4 == 1
    direction = torch.randn(DIM, generator=torch.Generator().manual_seed(4))
    q, k[:, :, looked_at] = q + direction, k[:, :, looked_at] + direction
    v[:, :, looked_at] += 5
    assert abs(float(v.mean()) - 1.25) < 0.1
    assert float(fit(q, k, v, scale=0.2).values[0].mean()) > 4


def test_scales_balance_keys_and_queries_and_lower_the_error_of_scores():
    spread = torch.randn(2, DIM, generator=torch.Generator().manual_seed(5)).exp()
    q, k = queries() * spread[0], keys() * spread[1]
    means = fit(q, k, keys(2), scale=1e-4)
    scale = means.scales[0]
    want = (spread[1] / spread[0]).sqrt()
    torch.testing.assert_close(scale / (want / want.log().mean().exp()), torch.ones(HEADS, DIM), rtol=0, atol=0.15)
    codec, errors = make_codec("tq3", DIM), []
    for s in (torch.ones(HEADS, DIM), scale):
        x = k[0] / s[:, None]
        wrong = (unrotate(codec.decode(codec.encode(rotate(x)))) - x) * s[:, None]
        errors.append(float((q[0].view(HEADS, -1, DIM) @ wrong.mT).square().mean()))
    assert errors[1] < 0.5 * errors[0]


def test_the_size_of_the_chunks_does_not_matter():
    k, _ = biased(0)
    whole, pieces = (fit(queries(), k, keys(2), chunk, 0.02) for chunk in (N, 96))
    for a, b in ((whole.keys, pieces.keys), (whole.values, pieces.values), (whole.scales, pieces.scales)):
        torch.testing.assert_close(a[0], b[0], rtol=1e-5, atol=1e-5)


def test_channels_that_nobody_asks_for_and_heads_of_zeros_get_finite_scales():
    q, k = queries(), keys()
    q[..., :8], k[..., 4:12], k[:, 1] = 0, 0, 0
    means = fit(q, k, torch.zeros_like(k))
    assert all(bool(x.isfinite().all()) for x in (means.keys[0], means.values[0], means.scales[0]))
    assert means.scales[0][0, :4].min() > means.scales[0][0, 12:].max()  # large keys, no queries


def test_means_of_pages_leave_less_than_one_constant_does():
    k, _ = biased(0)
    means, coded = fit(queries(), k, keys(2)), k[0, :, 64:]
    pages = turn(means.keys[0][:, None], page_turns(FREQUENCIES, 64, 7)).repeat_interleave(64, 1)
    assert (coded - pages).square().mean() < 0.8 * (coded - coded.mean(1, keepdim=True)).square().mean()


def test_what_cannot_be_fitted_is_refused():
    empty = TransformFit(64)
    with pytest.raises(MeansError, match="no tokens"):
        empty.finish("test", None)
    with pytest.raises(IntegrityError):
        empty.add(0, queries(n=4), keys(n=4), keys(n=5), 1.0)
    empty.add(0, queries(n=4), keys(n=4), keys(n=4), 1.0)
    with pytest.raises(MeansError, match="no tokens"):
        empty.finish("test", None)  # all of them are sinks
    with pytest.raises(IntegrityError):
        empty.add(0, queries(n=4), keys(n=4)[:, :1], keys(n=4)[:, :1], 1.0)
    empty.add(0, queries(n=60), torch.full((1, HEADS, 60, DIM), torch.inf), keys(n=60), 1.0)
    with pytest.raises(MeansError, match="not finite"):
        empty.finish("test", None)
