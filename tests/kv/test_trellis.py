"""Trellis codes: codebooks against exact arithmetic, the search against brute force, the bit stream bit by bit."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import operator

import numpy as np
import pytest
import torch

from turbomoe.insight import kv_auto
from turbomoe.kv.codebooks import POSITIVE_STEPS
from turbomoe.kv.codecs import make_codec
from turbomoe.kv.codecs.scales import spread_out
from turbomoe.kv.codecs.windows import from_planes, pair_windows, to_planes
from turbomoe.kv.trellis_codebook import ALL, GAUSSIAN_NMSE, TRELLISES, UNIT, Lookup, Magnitudes, Trellis, codebook
from turbomoe.kv.trellis_search import UNREACHABLE, _forward, search

# SHA-256 of the codebook as little-endian halves, value by value: what stored codes mean.
DIGESTS = {
    "tcq2": "6c1a4ac9ac977ea6e0755f80fa12ccca73894b27752348b53804a0cf27faa850",
    "tcq2.5": "da686f4b6f0cedd8fc7a383992e59dfd0291e840f7403463ee5c4462ca2cdf0c",
    "tcq3": "13c335a90d2dd8dee02da8414db729894312cc6b8bd7d8533647b02a2c249077",
    "tcq4": "7267a5cc35e0968c09d951d688d7dd27fd189f519f2fde8a058a1518664f6d49",
}
BITS = {"tcq2": 2, "tcq2.5": 2.5, "tcq3": 3, "tcq4": 4}
# Small enough to try every path: 2^10, 2^12 (two bits a step), 2^8 (two values a step) and 2^9.
_LEVELS = (-60, -35, -18, -5, 6, 19, 33, 61)
_MAGNITUDES = (13, 37, 63, 101, 115, 139, 127, 177)
_MIXED = (19, -5, 61, -35, -60, 33, 6, -18)
TINY = [
    (Trellis("one", 3, 1, 1, 1, (Lookup(((0, ALL),), _LEVELS),)), 10),
    (Trellis("two", 4, 2, 1, 2, (Lookup(((0, ALL), (3, 0x11)), _MIXED),)), 6),
    (Trellis("pair", 3, 1, 2, 0, (), Magnitudes(((4, 1, 3, 2, 5, 6), (2, 7, 4, 1, 1, 5)), _MAGNITUDES)), 8),
    (Trellis("alone", 6, 2, 1, 0, (), Magnitudes(((36, 17, 10, 32, 1, 7),), _MAGNITUDES)), 6),
    (Trellis("long", 5, 1, 1, 1, (Lookup(((0, ALL),), _LEVELS), Lookup(((2, ALL),), _MIXED))), 9),
]  # fmt: skip


@pytest.mark.parametrize("name", TRELLISES)
def test_the_codebook_is_pinned(name: str) -> None:
    table = codebook(TRELLISES[name])
    assert torch.equal(table, table.half().float())
    assert hashlib.sha256(table.numpy().astype("<f2").tobytes()).hexdigest() == DIGESTS[name]


def by_the_book(trellis: Trellis, window: int, value: int) -> float:
    """One value of a window, bit by bit."""

    def bit(place: int) -> int:
        step, inside = divmod(place, trellis.field)
        at = step * trellis.step_bits + inside
        return window >> at & 1 if place >= 0 and inside < trellis.step_bits and at < trellis.window_bits else 0

    if trellis.magnitudes is not None:
        sign, a, b, *deep = ((window & mask).bit_count() % 2 for mask in trellis.magnitudes.masks[value])
        chosen = 4 + 2 * deep[1] + deep[2] if a and b and deep[0] else 2 * a + b
        return (-1) ** sign * trellis.magnitudes.levels[chosen] * UNIT / 2
    total = 0
    for lookup in trellis.lookups:
        index = 0
        for e in range(3):
            seen = [bit(e + shift) & mask >> e for shift, mask in lookup.taps]
            if lookup.function is not None:
                seen[:3] = [lookup.function >> 4 * seen[0] + 2 * seen[1] + seen[2]]
            index |= (sum(seen) & 1) << e
        total += lookup.levels[index]
    return total * UNIT


@pytest.mark.parametrize("trellis", [*TRELLISES.values(), *(t for t, _ in TINY)], ids=lambda t: t.name)
def test_the_codebook_bit_by_bit(trellis: Trellis) -> None:
    want = [[by_the_book(trellis, w, v) for w in range(trellis.states)] for v in range(trellis.values)]
    assert torch.equal(codebook(trellis), torch.tensor(want))


@pytest.mark.parametrize("name", TRELLISES)
def test_taps_see_their_own_window(name: str) -> None:
    """Every bit that counts is one of the window's, or between steps: what surrounds a window changes nothing."""
    trellis = TRELLISES[name]
    for lookup in trellis.lookups:
        for shift, mask in lookup.taps:
            for place in (e + shift for e in range(3) if mask >> e & 1):
                step, inside = divmod(place, trellis.field)
                at = step * trellis.step_bits + inside
                assert inside >= trellis.step_bits or 0 <= at < trellis.window_bits


@pytest.mark.parametrize("name", TRELLISES)
def test_sums_of_levels_are_bytes(name: str) -> None:
    """Counted from the lowest of each table: the assembly adds four at a time, none may carry."""
    ranges = [max(lookup.levels) - min(lookup.levels) for lookup in TRELLISES[name].lookups]
    assert sum(ranges) <= 255


def test_magnitudes_leave_the_sign_alone() -> None:
    """Its bit is put in by the assembly; every bit of a window counts, and the outer levels are for few windows."""
    magnitudes = TRELLISES["tcq2.5"].magnitudes
    assert magnitudes is not None
    assert all(0 < level < 256 and level % 2 for level in magnitudes.levels)
    assert functools.reduce(operator.or_, itertools.chain(*magnitudes.masks)) == 1023
    values, counts = codebook(TRELLISES["tcq2.5"]).abs().unique(return_counts=True)
    assert counts.sum() == 2048 and counts[values < 1.1].tolist() == [512] * 3


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
    """The bits of the stream, from stored bytes: it is cut into runs of whole steps and whole 32-bit words, of which
    all first words are stored first, then all second ones. Of five bits a step, a run's first word has the first bits
    of its steps.
    """
    run = {2: 1, 3: 3, 4: 1, 5: 5}[step_bits]
    words = [[byte >> i & 1 for byte in stored[at : at + 4] for i in range(8)] for at in range(0, len(stored), 4)]
    if len(stored) % (4 * run):
        return list(itertools.chain(*words))
    runs = len(words) // run
    if step_bits == 5:
        return [words[plane * runs + i][step] for i in range(runs) for step in range(32) for plane in range(5)]
    return [bit for i in range(len(words)) for bit in words[i % run * runs + i // run]]


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
        stream = in_order(codes[row].tolist(), trellis.step_bits)
        at = [[(trellis.step_bits * i + b) % len(stream) for b in range(trellis.window_bits)] for i in range(dim)]
        read = [sum(stream[p] << b for b, p in enumerate(places)) for places in at[: dim // trellis.values]]
        assert read == windows[row].tolist()
        values = table[:, read].t().flatten()
        assert torch.equal(values * scales[row].float(), decoded[row])


@pytest.mark.parametrize("name", TRELLISES)
@pytest.mark.parametrize("count", [20, 60, 64, 96, 320])
def test_what_is_stored_is_the_stream_again(name: str, count: int) -> None:
    stream = torch.randint(0, 256, (3, 2, count), dtype=torch.uint8)
    stored = to_planes(stream, TRELLISES[name])
    assert stored.shape == stream.shape and stored.dtype == torch.uint8
    assert torch.equal(from_planes(stored, TRELLISES[name]), stream)


@pytest.mark.parametrize("name", TRELLISES)
def test_pair_windows_fit_their_words(name: str) -> None:
    windows = pair_windows(TRELLISES[name])
    assert windows.group * windows.stride % 8 == 0
    assert (windows.group - 1) * windows.stride + windows.bits <= 32 or (name, windows.group) == ("tcq2.5", 8)


@pytest.mark.parametrize("name", TRELLISES)
def test_the_trellis_constrains(name: str) -> None:
    """Any sequence of the codebook's values would come closer than any code of this rate can (2^-2b of the energy): by
    half with the sixteen levels of tcq2.5, by more with the others.
    """
    trellis, bits = TRELLISES[name], BITS[name]
    x = torch.randn(400, 128)
    pairs = x.unflatten(-1, (-1, trellis.values))
    squares = sum((pairs[..., v, None] - row) ** 2 for v, row in enumerate(codebook(trellis)))
    free = float(squares.amin(-1).sum() / x.square().sum())
    chosen = codebook(trellis).t()[search(x, trellis)].flatten(1)
    coded = float((chosen - x).square().sum() / x.square().sum())
    assert free < (0.53 if name == "tcq2.5" else 0.5) * 2.0 ** (-2 * bits) < 2.0 ** (-2 * bits) < coded
    assert trellis.states // trellis.groups == 2 ** (bits * trellis.values)


# Error of the trellis over that of the scalar codec at the same bits, by the tables of both (tcq2.5: half a bit more).
@pytest.mark.parametrize(("name", "scalar", "ratio"), [
    ("tcq2", "tq2", 0.66), ("tcq3", "tq3", 0.59), ("tcq4", "tq4", 0.59), ("tcq2.5", "tq3", 1.18),
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


@pytest.mark.parametrize(("name", "limit"), [
    ("tcq2", 0.0765), ("tcq2.5", 0.039), ("tcq3", 0.0195), ("tcq4", 0.0056),
])  # fmt: skip
def test_the_measured_errors_are_those_that_were_asked_for(name: str, limit: float) -> None:
    assert all(2.0 ** (-2 * BITS[name]) < error <= limit for error in GAUSSIAN_NMSE[name].values())


def test_other_codebooks_are_another_version() -> None:
    """Whoever changes the digests raises both numbers: saved sessions carry one, kept measurements of KL the other."""
    versions = {name: make_codec(name, 64).version for name in (*TRELLISES, "tq2", "tq3", "tq4")}
    scalar = {"tq2": 2, "tq3": 2, "tq4": 2}
    assert (versions, kv_auto.CODES) == ({"tcq2": 2, "tcq2.5": 3, "tcq3": 2, "tcq4": 2} | scalar, 3)
    assert POSITIVE_STEPS == {2: (3, 10), 3: (10, 31, 55, 88), 4: (3, 9, 15, 21, 28, 36, 46, 61)}
    assert [digest[:4] for digest in DIGESTS.values()] == ["6c1a", "da68", "13c3", "7267"]


@pytest.mark.parametrize("name", TRELLISES)
def test_a_vector_of_zeros_and_a_bad_one_have_the_codes_of_zeros(name: str) -> None:
    codec = make_codec(name, 64)
    x = torch.zeros(4, 64)
    x[1, 3], x[2, 60], x[3] = math.nan, math.inf, -math.inf
    codes, scales = codec.encode(x)
    assert bool((codes == codes[0]).all())
    assert scales[0] == 0 and bool(scales[1:].isnan().all())
