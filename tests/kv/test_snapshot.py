"""One slot's memory out of a cache and into another: nothing lost, nothing else touched, and it goes on the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from turbomoe.config import KVSettings
from turbomoe.errors import ContextFullError
from turbomoe.kv.cache import KVCache
from turbomoe.kv.codecs import CODECS, make_codec
from turbomoe.kv.means import KVMeans
from turbomoe.kv.shape import AttentionShape, RecurrentShape
from turbomoe.kv.snapshot import depends_on, nbytes, parts, restore

HEADS, KV_HEADS, DIM, WINDOW = 4, 2, 32, 9
SCALE = DIM**-0.5
FULL, SLIDING = AttentionShape(0, HEADS, KV_HEADS, DIM), AttentionShape(1, HEADS, KV_HEADS, DIM, WINDOW)
RECURRENT = RecurrentShape(2, (6, 3), (2, 4, 5))
SHAPES = (FULL, SLIDING, RECURRENT)
TYPES = [("f32", "f32"), ("bf16", "bf16"), ("q8_0", "q8_0"), ("tq4", "tq3"), ("tq2", "tq2"), ("bf16", "tq3")]
Arrays = dict[str, torch.Tensor]


def means() -> KVMeans:
    g = torch.Generator().manual_seed(3)
    keys, values = ({layer: torch.randn(KV_HEADS, DIM, generator=g) for layer in (0, 1)} for _ in range(2))
    return KVMeans(keys, values, "test")


def cache_for(kv: KVSettings, *, ctx: int = 400, slots: int = 2, with_means: bool = True) -> KVCache:
    return KVCache(SHAPES, kv, slots=slots, ctx_size=ctx, means=means() if with_means else None)


def feed(cache: KVCache, slot: int, chunks: list[int], seed: int = 0) -> list[torch.Tensor]:
    """Random tokens through every layer; what each attention layer answered."""
    g = torch.Generator().manual_seed(seed)
    outs = []
    for count in chunks:
        step = cache.begin([slot], count)
        for layer in (0, 1):
            q = torch.randn(1, HEADS, count, DIM, generator=g)
            k, v = (torch.randn(1, KV_HEADS, count, DIM, generator=g) + 1 for _ in range(2))
            outs.append(cache.attend(layer, q, k, v, SCALE))
        state = cache.recurrent[2]
        conv, memory = state.read(step.slots)
        draw = [torch.randn(old.shape, generator=g) for old in (conv, memory)]
        state.write(step.slots, conv + draw[0], memory / 2 + draw[1])
        cache.commit()
    return outs


def snapshot(cache: KVCache, slot: int) -> Arrays:
    """Copies of all parts of a slot, each as its part announces it."""
    found = {}
    for part in parts(cache, slot, cache.host_lengths[slot]):
        array = part.read().clone()
        assert (tuple(array.shape), array.dtype) == (part.shape, part.dtype), part.name
        assert part.name not in found
        found[part.name] = array
    return found


def same(a: Arrays, b: Arrays) -> bool:
    """Bit by bit (a NaN equals itself)."""
    return list(a) == list(b) and all(
        torch.equal(a[name].contiguous().view(torch.uint8), b[name].contiguous().view(torch.uint8)) for name in a
    )


def in_use(kv: KVSettings, ctx: int, slots: int) -> KVCache:
    """A cache whose pages have been dealt out, given back and mixed, with a neighbour in slot 0."""
    cache = cache_for(kv, ctx=ctx, slots=slots)
    for slot in range(slots):
        feed(cache, slot, [min(150, ctx)], seed=slot)
    for slot in reversed(range(1, slots)):
        cache.release(slot)
    return cache


@pytest.mark.parametrize("chunks", [[1], [5], [64, 1, 1], [200] + [1] * 9, [37] * 8], ids=lambda c: f"{sum(c)}")
@pytest.mark.parametrize("sink,recent", [(0, 0), (4, 16), (0, 16), (7, 0), (64, 128)])
@pytest.mark.parametrize("type_k,type_v", TYPES)
def test_a_slot_moves_to_another_cache_and_goes_on_the_same(type_k, type_v, sink, recent, chunks):
    moves(KVSettings(type_k, type_v, sink, recent), chunks)


@pytest.mark.parametrize("name", CODECS)
def test_every_codec_moves(name):
    moves(KVSettings(name, name, 4, 16), [90, 1])


def moves(kv: KVSettings, chunks: list[int]) -> None:
    """Out of one cache, into another, and on in both with the same tokens."""
    old, new = cache_for(kv), in_use(kv, ctx=700, slots=4)
    feed(old, 1, chunks)
    arrays, neighbour = snapshot(old, 1), snapshot(new, 0)
    restore(new, 3, sum(chunks), arrays.__getitem__)
    assert same(snapshot(new, 3), arrays)
    assert same(snapshot(new, 0), neighbour)
    more = [1, 1, 70, 1]
    for a, b in zip(feed(old, 1, more, seed=9), feed(new, 3, more, seed=9), strict=True):
        assert torch.equal(a, b)
    assert same(snapshot(new, 3), snapshot(old, 1))
    new.check_integrity()


@pytest.mark.parametrize("length", [1, 3, 8, 40, 100])
def test_rows_are_in_order_of_position(length):
    """Of exact types every stored number is known: position p holds p."""
    cache = KVCache([FULL, SLIDING], KVSettings("f32", "tq3", 3, 8), slots=1, ctx_size=128)
    for at in range(length):
        cache.begin([0], 1)
        row = torch.full((1, KV_HEADS, 1, DIM), float(at))
        for layer in (0, 1):
            cache.attend(layer, torch.zeros(1, HEADS, 1, DIM), row, row, SCALE)
        cache.commit()
    stored = {name: array for name, array in snapshot(cache, 0).items() if "keys" in name}
    positions = {name: array[:, 0, 0].tolist() for name, array in stored.items()}
    want = {
        "layers.0.keys.sinks": range(min(3, length)),
        "layers.0.keys.recent": range(max(0, length - 8), length),
        "layers.0.keys.values": range(3, length - 8),
        "layers.1.keys.recent": range(max(0, length - WINDOW + 1), length),
    }
    assert positions == {name: list(map(float, at)) for name, at in want.items() if len(at)}


def test_only_what_is_used_is_named():
    kv = KVSettings("tq3", "q8_0", 4, 16)
    cache = cache_for(kv)
    assert nbytes(cache, 0) == sum(part.nbytes for part in parts(cache, 0, 0)) == (6 * 3 + 2 * 4 * 5) * 4
    feed(cache, 0, [300])
    shapes = {part.name: part.shape for part in parts(cache, 0, 300)}
    assert shapes["layers.0.keys.codes"] == (280, KV_HEADS, 12) and shapes["layers.0.keys.scales"] == (280, KV_HEADS, 1)
    assert shapes["layers.0.values.codes"] == (280, KV_HEADS, 32)
    assert len(shapes) == 2 * 4 + 2 + 2
    assert nbytes(cache, 300) == sum(array.nbytes for array in snapshot(cache, 0).values())


def test_rows_behind_a_sequence_that_was_cut_back_stay_behind():
    kv = KVSettings("f32", "f32")
    cache, other = (KVCache([FULL], kv, slots=1, ctx_size=200) for _ in range(2))
    q = torch.randn(1, HEADS, 100, DIM)
    k, v = (torch.full((1, KV_HEADS, 100, DIM), torch.nan) for _ in range(2))
    cache.begin([0], 100)
    cache.attend(0, q, k, v, SCALE)
    cache.commit()
    cache.truncate(0, 0)
    cache.begin([0], 70)
    cache.attend(0, q[:, :, :70], k[:, :, :70].nan_to_num(1), v[:, :, :70].nan_to_num(1), SCALE)
    cache.commit()
    restore(other, 0, 70, snapshot(cache, 0).__getitem__)
    assert all(bool(plane.isfinite().all()) for side in other.attention[0] for plane in side.planes)


def test_what_a_slot_held_before_is_wiped():
    """A short sequence over a longer one: no page too many, and nothing of the old one to be read, NaN least of all."""
    kv = KVSettings("tq3", "f16", 4, 16)
    old, new, fresh = cache_for(kv), cache_for(kv), cache_for(kv)
    feed(old, 0, [30])
    feed(new, 0, [300])
    for stored in (
        x for side in new.attention[0] for x in (side.sinks, side.ring, *side.planes) if x.is_floating_point()
    ):
        stored.fill_(torch.nan)
    for cache in (new, fresh):
        restore(cache, 0, 30, snapshot(old, 0).__getitem__)
    assert new.pages.free_pages == fresh.pages.free_pages
    for a, b in zip(feed(new, 0, [1, 60], seed=2), feed(fresh, 0, [1, 60], seed=2), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("ctx", [16, 99])
def test_a_context_too_small_changes_nothing(ctx):
    kv = KVSettings("tq3", "tq3", 4, 16)
    old, new = cache_for(kv), cache_for(kv, ctx=ctx)
    feed(old, 0, [100])
    feed(new, 1, [10])
    before = snapshot(new, 1)
    with pytest.raises(ContextFullError, match="100 tokens do not fit"):
        restore(new, 1, 100, snapshot(old, 0).__getitem__)
    assert same(snapshot(new, 1), before) and new.host_lengths == [0, 10]
    new.check_integrity()


def test_a_reader_that_fails_half_way_leaves_the_slot_empty():
    kv = KVSettings("tq3", "tq3", 4, 16)
    old, new = cache_for(kv), cache_for(kv)
    feed(old, 0, [100])
    arrays = snapshot(old, 0)
    del arrays["layers.2.state"]  # the last one
    with pytest.raises(KeyError):
        restore(new, 0, 100, arrays.__getitem__)
    assert new.host_lengths == [0, 0] and new.pages.free_pages == cache_for(kv).pages.free_pages
    assert not any(stored.any() for side in new.attention[0] for stored in (side.sinks, side.ring, *side.planes))
    assert not new.recurrent[2].conv.any() and not new.recurrent[2].state.any()
    new.check_integrity()


@given(data=st.data())
@hypothesis_settings(max_examples=60)
def test_any_sequence_survives_any_move(data):
    type_k, type_v = data.draw(st.sampled_from(TYPES))
    kv = KVSettings(type_k, type_v, data.draw(st.integers(0, 70)), data.draw(st.integers(0, 90)))
    chunks = data.draw(st.lists(st.integers(1, 80), min_size=1, max_size=5))
    length = sum(chunks)
    # Shrunken windows too: a context shorter than the windows has smaller ones.
    old = cache_for(kv, ctx=data.draw(st.integers(length, 450)))
    new = cache_for(kv, ctx=data.draw(st.integers(length + 3, 600)), slots=3)
    feed(old, 0, chunks)
    feed(new, 1, [data.draw(st.integers(1, 20))])
    arrays = snapshot(old, 0)
    restore(new, 1, length, arrays.__getitem__)
    assert same(snapshot(new, 1), arrays)
    if old.ctx_size >= length + 3 and (old.sink, old.recent) == (new.sink, new.recent):
        for a, b in zip(feed(old, 0, [2, 1], seed=5), feed(new, 1, [2, 1], seed=5), strict=True):
            assert torch.equal(a, b)
    new.check_integrity()


# What codes depend on

PLAIN = KVSettings("tq3", "tq2", 4, 16)


@pytest.mark.parametrize("ctx,slots", [(10, 1), (5000, 3)])
def test_the_size_of_a_cache_does_not_matter(ctx, slots):
    assert depends_on(cache_for(PLAIN, ctx=ctx, slots=slots)) == depends_on(cache_for(PLAIN))


@pytest.mark.parametrize(
    "change,differing",
    [
        ({"type_k": "tq4"}, {"types", "codecs"}),
        ({"type_v": "tq3"}, {"types", "codecs"}),
        ({"sink": 5}, {"windows"}),
        ({"recent": 15}, {"windows"}),
        ({"type_k": "bf16", "type_v": "bf16"}, {"types", "codecs", "windows", "rotation", "means"}),
    ],
)
def test_settings_that_matter(change, differing):
    mine, other = depends_on(cache_for(PLAIN)), depends_on(cache_for(replace(PLAIN, **change)))
    assert {name for name in mine if mine[name] != other[name]} == differing


def test_windows_do_not_matter_where_there_are_none():
    exact = [KVSettings("bf16", "bf16", sink, 16) for sink in (4, 8)]
    assert depends_on(cache_for(exact[0])) == depends_on(cache_for(exact[1]))


def test_means_shapes_states_versions_and_signs_matter(monkeypatch):
    mine = depends_on(cache_for(PLAIN))
    assert mine["means"] == means().digest
    assert depends_on(cache_for(PLAIN, with_means=False))["means"] is None
    shapes = KVCache((replace(FULL, kv_heads=1), *SHAPES[1:]), PLAIN, slots=1, ctx_size=9)
    assert depends_on(shapes)["layers"] != mine["layers"]
    half = KVCache(SHAPES, PLAIN, slots=1, ctx_size=9, dtype=torch.bfloat16)
    assert depends_on(half)["dtype"] == "bfloat16" != mine["dtype"]
    monkeypatch.setattr("turbomoe.kv.hadamard.SIGN_SEED", "other signs")
    assert depends_on(cache_for(PLAIN))["rotation"] == "other signs" != mine["rotation"]
    monkeypatch.setattr(type(make_codec("tq3", DIM)), "version", 9)
    assert depends_on(cache_for(PLAIN))["codecs"] != mine["codecs"]
