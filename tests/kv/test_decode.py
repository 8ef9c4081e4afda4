"""The direct path of decoding: what it reads, what it stores, and how little it does for that."""

import pytest
import torch

from turbomoe.config import KVSettings
from turbomoe.kv.cache import KVCache
from turbomoe.kv.codecs import CODECS, make_codec
from turbomoe.kv.codecs.lloydmax import LloydMaxCodec
from turbomoe.kv.hadamard import rotate, rotation, unrotate
from turbomoe.kv.means import KVMeans
from turbomoe.kv.shape import AttentionShape

KV_HEADS, GROUP, DIM, LAYERS = 2, 3, 64, 4
TYPES = [(t, t) for t in CODECS] + [("f32", "bf16"), ("q8_0", "tq3"), ("bf16", "tq2")]


def fresh(tokens: int, seed: int, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    heads = (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)
    return tuple(torch.randn(batch, h, tokens, DIM, generator=g) for h in heads)


def cache_of(type_k: str, type_v: str, *, slots: int = 1, layers: int = LAYERS, windows=(4, 8), means=None) -> KVCache:
    shapes = [AttentionShape(i, KV_HEADS * GROUP, KV_HEADS, DIM) for i in range(layers)]
    return KVCache(shapes, KVSettings(type_k, type_v, *windows), slots=slots, ctx_size=300, means=means)


def step_through(cache: KVCache, slots: list[int], count: int, seed: int) -> list[torch.Tensor]:
    """One step of ``count`` tokens through all layers, every layer with keys of its own."""
    cache.begin(slots, count)
    outs = [cache.attend(i, *fresh(count, 1000 * seed + i, len(slots)), DIM**-0.5) for i in range(len(cache.shapes))]
    cache.commit()
    return outs


def means() -> KVMeans:
    g = torch.Generator().manual_seed(7)
    *sides, scales = [{i: torch.randn(KV_HEADS, DIM, generator=g) for i in range(LAYERS)} for _ in range(3)]
    return KVMeans(*sides, "test", {i: s.exp() for i, s in scales.items()}, 0.8 ** torch.arange(24))


@pytest.mark.parametrize("name", CODECS)
def test_reading_is_decoding_in_another_order(name):
    codec = make_codec(name, DIM)
    planes = codec.encode(torch.randn(3, 2, 5, DIM))
    values, scales = codec.read(planes)
    values = values if scales is None else values * scales
    order = torch.arange(DIM).view(codec.stride, -1).t().flatten()
    assert torch.equal(values, codec.decode(planes)[..., order])


@pytest.mark.parametrize("dim", [8, 64, 256])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_the_rotation_as_a_matrix(dim, stride):
    x, r = torch.randn(5, dim), rotation(dim, "cpu", stride)
    order = torch.arange(dim).view(stride, -1).t().flatten()
    torch.testing.assert_close(x @ r, rotate(x)[:, order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotate(x)[:, order] @ r.t(), unrotate(rotate(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("type_k,type_v", TYPES)
@pytest.mark.parametrize("with_means", [False, True])
def test_views_of_a_lone_sequence_give_what_indices_give(type_k, type_v, with_means):
    """The same steps with ``lone`` switched off: equal bits in the memory, equal outputs up to rounding."""
    table = means() if with_means else None
    caches = [cache_of(type_k, type_v, slots=2, means=table) for _ in range(2)]
    indexed = caches[1]
    indexed._lone = lambda slots: None
    for seed, count in enumerate([1, 1, 5, 1, 1, 70] + [1] * 6):
        outs = [step_through(cache, [1], count, seed) for cache in caches]
        for a, b in zip(*outs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for layer in range(LAYERS):
        for a, b in zip(caches[0].attention[layer], indexed.attention[layer], strict=True):
            stored = [(a.sinks, b.sinks), (a.ring, b.ring)] + [
                (p[1:], q[1:]) for p, q in zip(a.planes, b.planes, strict=True)
            ]
            assert all(torch.equal(p, q) for p, q in stored)


@pytest.mark.parametrize("type_k,type_v", TYPES)
@pytest.mark.parametrize("with_means", [False, True])
def test_all_layers_at_once_store_what_each_layer_alone_stores(type_k, type_v, with_means):
    """Token by token against one chunk, layer by layer: the codes have equal bits."""
    table = means() if with_means else None
    q, k, v = fresh(90, 5)
    single, chunk = (cache_of(type_k, type_v, means=table) for _ in range(2))
    for t in range(90):
        single.begin([0], 1)
        for layer in range(LAYERS):
            single.attend(layer, *(x[:, :, t : t + 1] * (layer + 1) for x in (q, k, v)), 0.1)
        single.commit()
    chunk.begin([0], 90)
    for layer in range(LAYERS):
        chunk.attend(layer, *(x * (layer + 1) for x in (q, k, v)), 0.1)
    chunk.commit()
    for layer in range(LAYERS):
        for a, b in zip(single.attention[layer], chunk.attention[layer], strict=True):
            assert all(torch.equal(p[1:], q[1:]) for p, q in zip(a.planes, b.planes, strict=True))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_decode_step_encodes_twice_whatever_the_number_of_layers(monkeypatch, batch):
    calls = []
    encode = LloydMaxCodec.encode
    monkeypatch.setattr(LloydMaxCodec, "encode", lambda self, x: calls.append(len(x)) or encode(self, x))
    cache = cache_of("tq3", "tq3", slots=batch)
    for slot in range(batch):
        step_through(cache, [slot], 40, slot)
    calls.clear()
    step_through(cache, list(range(batch)), 1, 9)
    assert calls == [LAYERS, LAYERS]


def test_nothing_is_encoded_before_the_windows_are_full(monkeypatch):
    calls = []
    encode = LloydMaxCodec.encode
    monkeypatch.setattr(LloydMaxCodec, "encode", lambda self, x: calls.append(len(x)) or encode(self, x))
    cache = cache_of("tq3", "tq3")
    for t in range(12):
        step_through(cache, [0], 1, t)
    assert not calls
    step_through(cache, [0], 1, 12)
    assert len(calls) == 2


def test_index_tensors_and_masks_are_made_once_a_step():
    cache = cache_of("tq3", "tq3")
    step_through(cache, [0], 40, 0)
    step = cache.begin([0], 1)
    cache.attend(0, *fresh(1, 1), 0.1)
    made = dict(step._made)
    for layer in range(1, LAYERS):
        cache.attend(layer, *fresh(1, layer), 0.1)
    assert step._made.keys() == made.keys() and all(step._made[key] is made[key] for key in made)


def test_pages_in_one_run_are_read_in_place():
    """A lone sequence's float32 pages are handed to the product as they lie; scattered ones are gathered."""
    cache = cache_of("f32", "f32", slots=2, layers=1)
    for seed, slot in enumerate([0, 1, 0]):
        step_through(cache, [slot], 100, seed)
    keys, _ = cache.attention[0]
    step = cache.begin([0], 1)
    assert step.pages[0, :4].tolist() == [1, 2, 5, 6]
    for pages, in_place in ((2, True), (4, False)):
        values, scales = keys.tile(step, 0, pages)
        assert scales is None and torch.equal(values[0], keys.planes[0][step.pages[0, :pages]])
        assert (values.data_ptr() == keys.planes[0][1].data_ptr()) is in_place


def test_layers_of_several_shapes_are_kept_apart():
    shapes = [AttentionShape(0, 4, 2, 64), AttentionShape(1, 4, 2, 64, window=9), AttentionShape(2, 4, 2, 32),
              AttentionShape(3, 4, 2, 64)]  # fmt: skip
    cache = KVCache(shapes, KVSettings("tq3", "tq4", 4, 8), slots=1, ctx_size=64)
    assert [tuple(cache.attention[i][0].ring.shape) for i in range(4)] == [
        (1, 2, 8, 64), (1, 2, 8, 64), (1, 2, 8, 32), (1, 2, 8, 64),
    ]  # fmt: skip
    assert [len(cache.attention[i][0].planes) for i in range(4)] == [2, 0, 2, 2]
    assert sum(side.nbytes() for pair in cache.attention.values() for side in pair) == sum(
        t.untyped_storage().nbytes()
        for _, *groups in cache._groups
        for group in groups
        for t in (group.rings, group.sides[0].sinks, *group.planes)
    )


@pytest.mark.parametrize("type_name", CODECS)
def test_a_batch_is_not_poisoned_by_rows_that_are_not_its_own(type_name):
    """Rows without a past write to the scratch page and read it: a NaN there must stay with who wrote it."""
    cache = cache_of(type_name, type_name, slots=3, layers=1)
    for slot, count in ((0, 200), (1, 50)):
        step_through(cache, [slot], count, slot)
    for seed in range(12):  # with windows, the first NaN leaves the ring for the scratch page after 8 tokens
        q, k, v = fresh(1, seed, 3)
        bad = torch.tensor([1.0, 1.0, float("nan")])[:, None, None, None]
        cache.begin([0, 1, 2], 1)
        out = cache.attend(0, q, k * bad, v * bad, 0.1)
        cache.commit()
        assert out[:2].isfinite().all() and out[2].isnan().all()
