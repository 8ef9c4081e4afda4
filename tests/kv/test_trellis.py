"""Trellis codes: codebooks against exact arithmetic, the search against brute force, the bit stream bit by bit."""

from __future__ import annotations

import hashlib
import itertools
import math

import numpy as np
import pytest
import torch

from turbomoe.kv.codecs import make_codec
from turbomoe.kv.codecs.scales import spread_out
from turbomoe.kv.codecs.windows import pair_windows
from turbomoe.kv.trellis_codebook import GAUSSIAN_NMSE, TRELLISES, Trellis, _hash, codebook
from turbomoe.kv.trellis_search import UNREACHABLE, _forward, search

# SHA-256 of the codebook as little-endian halves, value by value: what stored codes mean.
DIGESTS = {
    "tcq2": "927d144bf068858b324d37269ec9e24a88d9d05e7633d03bcc0742d06445f179",
    "tcq2.5": "be6808bbba26cac4d5a419f705fe0ac90696e0cee634f6d972d9681e08138667",
    "tcq3": "382314d854d3b2cfa78f0a140e5ca09e9cb684e80d1180ef726bcce146ff1f89",
    "tcq4": "9191b30aa4ec5a175ca4305f17cd3819302b77725ccca0716a8c8ebf55d90b61",
}
BITS = {"tcq2": 2, "tcq2.5": 2.5, "tcq3": 3, "tcq4": 4}
# Small enough to try every path: 2^10, 2^12 (two bits a step), 2^8 (two values a step) and 2^9.
TINY = [
    (Trellis("one", 3, 1, (3,), (1, 5), ((1.25, 0.75),)), 10),
    (Trellis("two", 4, 2, (5,), (1, 5), ((1.25, 0.75),)), 6),
    (Trellis("pair", 3, 1, (3, 1), (1, 5), ((1.25, 0.75), (1.0, 0.5))), 8),
    (Trellis("long", 5, 1, (11,), (1, 9), ((1.25, 1.0),)), 9),
]


@pytest.mark.parametrize("name", TRELLISES)
def test_the_codebook_is_pinned(name: str) -> None:
    table = codebook(TRELLISES[name])
    assert torch.equal(table, table.half().float())
    assert hashlib.sha256(table.numpy().astype("<f2").tobytes()).hexdigest() == DIGESTS[name]


@pytest.mark.parametrize("name", TRELLISES)
def test_the_hash_is_the_fraction_of_an_integer_product(name: str) -> None:
    """u = 2 * ((a * (w - half)) / 2^L - nearest integer), where +1 and -1 are the same point of the circle."""
    trellis = TRELLISES[name]
    half = trellis.states // 2
    for multiplier in trellis.multipliers:
        product = [multiplier * (w - half) for w in range(2 * half)]
        want = np.array([((p + half) % (2 * half) - half) / half for p in product])
        off = np.abs(_hash(trellis.window_bits, multiplier).astype(np.float64) - want)
        assert bool(((off == 0) | (off == 2)).all())


@pytest.mark.parametrize("name", TRELLISES)
def test_the_polynomial_up_to_the_rounding_of_halves(name: str) -> None:
    trellis = TRELLISES[name]
    for value, (multiplier, coefficients) in enumerate(zip(trellis.multipliers, trellis.coefficients, strict=True)):
        u = _hash(trellis.window_bits, multiplier).astype(np.float64)
        want = sum(c * u**e for e, c in zip(trellis.exponents, coefficients, strict=True))
        # Squaring doubles the relative error of a power: in the end at most exponent/2 * 2^-11. Terms sum to below 3.3.
        bound = 3.3 * (trellis.exponents[-1] / 2 + 4) * 2.0**-11
        assert float(np.abs(codebook(trellis)[value].numpy() - want).max()) <= bound


def paths(trellis: Trellis, steps: int) -> torch.Tensor:
    """All circular paths, int64 [2^(steps * step_bits), steps] of windows."""
    length = steps * trellis.step_bits
    stream = torch.arange(1 << length)
    doubled = stream | stream << length
    each = [(doubled >> trellis.step_bits * i) & trellis.states - 1 for i in range(steps)]
    return torch.stack(each, 1)


def cost(x: torch.Tensor, windows: torch.Tensor, trellis: Trellis) -> torch.Tensor:
    """Squared distance float64 of one vector to each path [..., steps]."""
    values = codebook(trellis).double().t()[windows].flatten(-2)
    return (x.double() - values).square().sum(-1)


@pytest.mark.parametrize(("trellis", "steps"), TINY, ids=lambda t: getattr(t, "name", ""))
def test_no_path_through_the_same_boundary_is_better(trellis: Trellis, steps: int) -> None:
    every = paths(trellis, steps)
    x = torch.randn(150, steps * trellis.values)
    for row, chosen in zip(x, search(x, trellis), strict=True):
        same_boundary = every[every[:, -1] == chosen[-1]]
        assert float(cost(row, chosen, trellis)) <= float(cost(row, same_boundary, trellis).min()) + 1e-5


def state_in_the_middle(x: np.ndarray, trellis: Trellis) -> int:
    """Where the best open path over x [64, values] stands after half of it, by costs from both sides, float64."""
    table = codebook(trellis).double().numpy().T
    distance = ((x[:, None, :] - table) ** 2).sum(-1)
    before, after = np.zeros(trellis.states), np.zeros(trellis.states)
    leads_to = [[w >> trellis.step_bits | new * trellis.groups for new in range(2**trellis.step_bits)]
                for w in range(trellis.states)]  # fmt: skip
    for step in range(32):
        best = np.full(trellis.states, np.inf)
        for w, targets in enumerate(leads_to):
            best[targets] = np.minimum(best[targets], before[w])
        before = best + distance[step]
    for step in reversed(range(32, 64)):
        after = np.array([min(after[w] + distance[step][w] for w in targets) for targets in leads_to])
    return int(np.argmin(before + after))


@pytest.mark.parametrize("trellis", [t for t, _ in TINY], ids=lambda t: t.name)
def test_the_boundary_is_where_the_best_path_around_it_stands(trellis: Trellis) -> None:
    x = torch.randn(40, 64 * trellis.values)
    for row, windows in zip(x, search(x, trellis), strict=True):
        around = row.double().view(64, -1).roll(32, 0)
        assert int(windows[-1]) == state_in_the_middle(around.numpy(), trellis)


@pytest.mark.parametrize("name", TRELLISES)
def test_trying_every_boundary_gains_little(name: str) -> None:
    """The whole circle from each possible state, as if time did not count."""
    trellis, x = TRELLISES[name], torch.randn(10, 64)
    chosen = codebook(trellis).t()[search(x, trellis)].flatten(1)
    mine = (chosen - x).square().sum(-1)
    start = torch.full((trellis.states, trellis.states), UNREACHABLE).fill_diagonal_(0.0)
    steps = x.unflatten(-1, (-1, trellis.values))
    best = [
        _forward(row.expand(trellis.states, -1, -1), start, trellis)[0].diagonal().min() for row in steps.split(1)
    ]  # fmt: skip
    assert bool((mine >= torch.stack(best) - 1e-4).all())
    assert float(mine.sum()) <= 1.05 * float(torch.stack(best).sum())


def in_order(stored: list[int], step_bits: int) -> list[int]:
    """Bytes in the order of the stream: it is cut into runs of whole steps and whole 32-bit words, of which all first
    words are stored first, then all second ones."""
    run = {2: 1, 3: 3, 4: 1, 5: 5}[step_bits]
    words = [stored[i : i + 4] for i in range(0, len(stored), 4)]
    if len(stored) % (4 * run):
        return stored
    runs = len(words) // run
    return [byte for i in range(len(words)) for byte in words[i % run * runs + i // run]]


@pytest.mark.parametrize(("name", "dim"), list(itertools.product(TRELLISES, [32, 64, 256])))
def test_a_path_is_a_circle_and_the_stream_holds_its_windows(name: str, dim: int) -> None:
    """The windows of the search, read bit by bit from the bytes; a reader that knows only the format."""
    trellis, codec = TRELLISES[name], make_codec(name, dim)
    x = torch.randn(30, dim)
    windows = search(spread_out(x)[0], trellis)
    kept = (1 << trellis.window_bits - trellis.step_bits) - 1
    assert torch.equal(windows & kept, windows.roll(1, 1) >> trellis.step_bits)
    codes, scales = codec.encode(x)
    decoded = codec.decode((codes, scales))
    table = codebook(trellis)
    for row in range(30):
        stream = [byte >> i & 1 for byte in in_order(codes[row].tolist(), trellis.step_bits) for i in range(8)]
        at = [[(trellis.step_bits * i + b) % len(stream) for b in range(trellis.window_bits)] for i in range(dim)]
        read = [sum(stream[p] << b for b, p in enumerate(places)) for places in at[: dim // trellis.values]]
        assert read == windows[row].tolist()
        values = table[:, read].t().flatten()
        assert torch.equal(values * scales[row].float(), decoded[row])


@pytest.mark.parametrize("name", TRELLISES)
def test_pair_windows_fit_their_words(name: str) -> None:
    windows = pair_windows(TRELLISES[name])
    assert windows.group * windows.stride % 8 == 0
    assert (windows.group - 1) * windows.stride + windows.bits <= 32 or (name, windows.group) == ("tcq2.5", 8)


@pytest.mark.parametrize("name", TRELLISES)
def test_the_trellis_constrains(name: str) -> None:
    """Any sequence of the codebook's values would come closer than any code of this rate can (2^-2b of the energy)."""
    trellis, bits = TRELLISES[name], BITS[name]
    x = torch.randn(400, 128)
    pairs = x.unflatten(-1, (-1, trellis.values))
    squares = sum((pairs[..., v, None] - row) ** 2 for v, row in enumerate(codebook(trellis)))
    free = float(squares.amin(-1).sum() / x.square().sum())
    chosen = codebook(trellis).t()[search(x, trellis)].flatten(1)
    coded = float((chosen - x).square().sum() / x.square().sum())
    assert free < 0.5 * 2.0 ** (-2 * bits) < 2.0 ** (-2 * bits) < coded
    assert trellis.states // trellis.groups == 2 ** (bits * trellis.values)


# Error of the trellis over that of the scalar codec at the same bits, by the tables of both (tcq2.5: half a bit more).
@pytest.mark.parametrize(("name", "scalar", "ratio"), [
    ("tcq2", "tq2", 0.66), ("tcq3", "tq3", 0.57), ("tcq4", "tq4", 0.57), ("tcq2.5", "tq3", 1.16),
    ("tcq2.5", "tq2", 0.34),
])  # fmt: skip
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_a_trellis_beats_the_scalar_codec(name: str, scalar: str, ratio: float, dim: int) -> None:
    x = torch.randn(100_000 // dim, dim)
    errors = []
    for each in (name, scalar):
        codec = make_codec(each, dim)
        errors.append(float((codec.decode(codec.encode(x)) - x).square().sum()))
    assert errors[0] <= ratio * errors[1]


@pytest.mark.parametrize(("name", "limit"), [("tcq2", 0.0765), ("tcq2.5", 0.039), ("tcq3", 0.0195), ("tcq4", 0.0056)])
def test_the_measured_errors_are_those_that_were_asked_for(name: str, limit: float) -> None:
    assert all(2.0 ** (-2 * BITS[name]) < error <= limit for error in GAUSSIAN_NMSE[name].values())


@pytest.mark.parametrize("name", TRELLISES)
def test_a_vector_of_zeros_and_a_bad_one_have_the_codes_of_zeros(name: str) -> None:
    codec = make_codec(name, 64)
    x = torch.zeros(4, 64)
    x[1, 3], x[2, 60], x[3] = math.nan, math.inf, -math.inf
    codes, scales = codec.encode(x)
    assert bool((codes == codes[0]).all())
    assert scales[0] == 0 and bool(scales[1:].isnan().all())
