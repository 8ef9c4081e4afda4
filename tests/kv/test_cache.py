"""The cache against an oracle that applies the visibility rule densely, key by key."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from turbomoe.config import KVSettings
from turbomoe.errors import ContextFullError, IntegrityError
from turbomoe.kv.cache import KVCache
from turbomoe.kv.codecs import make_codec
from turbomoe.kv.codecs.plain import PlainCodec
from turbomoe.kv.hadamard import rotate, unrotate
from turbomoe.kv.means import KVMeans
from turbomoe.kv.shape import AttentionShape, RecurrentShape
from turbomoe.kv.turns import page_turns, turn

HEADS, KV_HEADS, DIM = 6, 2, 64
SCALE = DIM**-0.5
TYPES = ["f32", "bf16", "q8_0", "tq4", "tq3", "tq2", "tcq4", "tcq3", "tcq2.5", "tcq2"]


def shape(window: int = 0) -> AttentionShape:
    return AttentionShape(layer=0, query_heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM, window=window)


def tokens(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key, value of ``n`` tokens with a strong key offset, as biased models have."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(1, HEADS, n, DIM, generator=g)
    k = torch.randn(1, KV_HEADS, n, DIM, generator=g) + 3 * torch.randn(1, KV_HEADS, 1, DIM, generator=g)
    v = torch.randn(1, KV_HEADS, n, DIM, generator=g) + 0.5
    return q, k, v


def means_of(k: torch.Tensor, v: torch.Tensor, turning: bool = False) -> KVMeans:
    keys, values = {0: k[0].mean(1)}, {0: v[0].mean(1)}
    if not turning:
        return KVMeans(keys, values, "test")
    scales = torch.randn(KV_HEADS, DIM, generator=torch.Generator().manual_seed(8)).exp()
    return KVMeans(keys, values, "test", {0: scales}, 0.7 ** torch.arange(20))


def key_transform(means: KVMeans, n: int, sink: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The means of ``n`` keys [kv_heads, n, dim] and scales.

    Channel by channel as the rotary embedding turns, in float64; what is returned agrees with that and was computed as
    the cache does: to a trellis two paths may be equally near, and the last bit of a vector decides.
    """
    r, mean = len(means.frequencies), means.keys[0].double()
    page_starts = sink + (torch.arange(n) - sink).clamp(min=0) // 64 * 64
    shift = mean[:, None].repeat(1, n, 1)
    for i, frequency in enumerate(means.frequencies.double().tolist()):
        wave = torch.exp(1j * frequency * page_starts.double()) * torch.complex(mean[:, None, i], mean[:, None, r + i])
        shift[..., i], shift[..., r + i] = wave.real, wave.imag
    pages = (page_starts - sink) // 64
    turned = turn(means.keys[0].float()[:, None], page_turns(means.frequencies, sink, int(pages.max()) + 1)[pages])
    turned = turned.expand_as(shift)
    torch.testing.assert_close(turned, shift.float(), rtol=1e-5, atol=1e-5)
    return turned, means.scales.get(0, torch.ones(KV_HEADS, DIM))[:, None]


def coded(
    x: torch.Tensor, type_name: str, shift: torch.Tensor | float, scale: torch.Tensor | float = 1.0
) -> torch.Tensor:
    """``x`` [1, kv_heads, n, dim] as it comes back out of the codec."""
    codec = make_codec(type_name, DIM)
    if not codec.rotated:
        return codec.decode(codec.encode(x.float()))
    return unrotate(codec.decode(codec.encode(rotate((x.float() - shift) * (1 / scale))))) * scale + shift


def oracle(q, k, v, settings, sink, recent, means):
    """Dense attention by the rule: sinks and t-recent..t exact, everything else through the codec."""
    exact_k = k if settings.type_k == "f32" else k.bfloat16().float()
    exact_v = v if settings.type_v == "f32" else v.bfloat16().float()
    n = q.shape[2]
    far_k = coded(exact_k, settings.type_k, *(key_transform(means, n, sink) if means else (0.0,)))
    far_v = coded(exact_v, settings.type_v, means.values[0][:, None] if means else 0.0)
    t, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    exact = ((j < sink) | (j >= t - recent)) & (j <= t)
    group = HEADS // KV_HEADS
    out = torch.zeros(1, n, HEADS, DIM)
    for head in range(HEADS):
        kv = head // group
        scores = torch.where(exact, q[0, head] @ exact_k[0, kv].T, q[0, head] @ far_k[0, kv].T) * SCALE
        p = scores.masked_fill(j > t, float("-inf")).softmax(-1)
        out[0, :, head] = (p * exact) @ exact_v[0, kv] + (p * ~exact) @ far_v[0, kv]
    return out


def feed(cache: KVCache, slot: int, q, k, v, chunks: list[int]) -> torch.Tensor:
    """Run one sequence through the cache in chunks of the given sizes."""
    outs, at = [], 0
    for count in chunks:
        part = slice(at, at + count)
        cache.begin([slot], count)
        outs.append(cache.attend(0, q[:, :, part], k[:, :, part], v[:, :, part], SCALE))
        cache.commit()
        at += count
    assert at == q.shape[2]
    return torch.cat(outs, 1)


def chunkings(n: int) -> dict[str, list[int]]:
    return {"one": [n], "many": [37] * (n // 37) + [n % 37], "mixed": [1] * 20 + [50] + [1] * 20 + [n - 90]}


@pytest.mark.parametrize("sink,recent", [(0, 0), (4, 0), (0, 16), (8, 32), (20, 200), (5, 7)])
@pytest.mark.parametrize("type_k,type_v", [(t, t) for t in TYPES] + [("tq3", "tq2"), ("bf16", "tq3"), ("q8_0", "f32")])
@pytest.mark.parametrize("with_means", ["plain", "means", "turning"])
def test_every_chunking_gives_what_the_rule_says(type_k, type_v, sink, recent, with_means):
    n = 140
    q, k, v = tokens(n)
    settings = KVSettings(type_k, type_v, sink, recent)
    means = None if with_means == "plain" else means_of(k, v, turning=with_means == "turning")
    want = None
    planes = {}
    for name, chunks in chunkings(n).items():
        cache = KVCache([shape()], settings, slots=2, ctx_size=n + 5, means=means)
        got = feed(cache, 1, q, k, v, chunks)
        if want is None:
            want = oracle(q, k, v, settings, cache.sink, cache.recent, means)
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")
        used = cache.pages._owned[1]
        planes[name] = [p[used] for side in cache.attention[0] for p in side.planes]
        cache.check_integrity()
    coded_tokens = n - cache.sink - cache.recent
    for other in ("many", "mixed"):
        for a, b in zip(planes["one"], planes[other], strict=True):
            a, b = (p.transpose(1, 2).flatten(0, 1)[: max(0, coded_tokens)] for p in (a, b))
            assert torch.equal(a, b), "codes depend on the chunking"


@pytest.mark.parametrize("type_name", TYPES)
def test_token_by_token_equals_one_chunk(type_name):
    n = 140
    q, k, v = tokens(n)
    settings = KVSettings(type_name, type_name, 8, 32)
    got = feed(KVCache([shape()], settings, slots=1, ctx_size=n), 0, q, k, v, [1] * n)
    want = feed(KVCache([shape()], settings, slots=1, ctx_size=n), 0, q, k, v, [n])
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("window", [1, 7, 64, 400])
def test_sliding_layer_sees_its_window_and_nothing_else(window):
    n = 150
    q, k, v = tokens(n)
    exact_k, exact_v = k.bfloat16().float(), v.bfloat16().float()
    t, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    visible = (j <= t) & (j > t - window)
    want = torch.nn.functional.scaled_dot_product_attention(
        q, exact_k, exact_v, attn_mask=visible, enable_gqa=True, scale=SCALE
    ).transpose(1, 2)
    for chunks in chunkings(n).values():
        cache = KVCache([shape(window)], KVSettings("tq3", "tq3", 8, 16), slots=1, ctx_size=n)
        torch.testing.assert_close(feed(cache, 0, q, k, v, chunks), want, rtol=2e-5, atol=2e-5)


def test_a_batch_of_unequal_sequences_equals_each_alone():
    settings = KVSettings("tq3", "tq3", 8, 16)
    lengths = [5, 90, 201]
    data = [tokens(n + 4, seed=n) for n in lengths]
    alone = []
    for q, k, v in data:
        cache = KVCache([shape()], settings, slots=1, ctx_size=256)
        alone.append(feed(cache, 0, q, k, v, [q.shape[2] - 4, 1, 1, 1, 1])[:, -4:])
    cache = KVCache([shape()], settings, slots=4, ctx_size=256)
    slots = [3, 0, 2]
    for slot, (q, k, v) in zip(slots, data, strict=True):
        n = q.shape[2] - 4
        feed(cache, slot, q[:, :, :n], k[:, :, :n], v[:, :, :n], [n])
    for step in range(4):
        batch = [torch.cat([x[i][:, :, x[0].shape[2] - 4 + step :][:, :, :1] for x in data]) for i in range(3)]
        cache.begin(slots, 1)
        out = cache.attend(0, *batch, SCALE)
        cache.commit()
        for row, want in enumerate(alone):
            torch.testing.assert_close(out[row, 0], want[0, step], rtol=1e-5, atol=1e-5)
    cache.check_integrity()


def test_a_reused_slot_remembers_nothing():
    settings = KVSettings("tq2", "tq2", 8, 16)
    cache = KVCache([shape()], settings, slots=1, ctx_size=128)
    feed(cache, 0, *tokens(128, seed=1), [128])
    cache.release(0)
    again = feed(cache, 0, *tokens(100, seed=2), [60, 40])
    fresh = feed(KVCache([shape()], settings, slots=1, ctx_size=128), 0, *tokens(100, seed=2), [60, 40])
    assert torch.equal(again, fresh)


@pytest.mark.parametrize("type_name", TYPES)
def test_numbers_gone_wrong_do_not_outlive_their_sequence(type_name):
    cache = KVCache([shape()], KVSettings(type_name, type_name, 8, 16), slots=1, ctx_size=128)
    q, k, v = tokens(128)
    feed(cache, 0, q, k * float("nan"), v * float("inf"), [128])
    cache.release(0)
    assert feed(cache, 0, *tokens(100), [60, 40]).isfinite().all()


@pytest.mark.parametrize("type_name", TYPES)
def test_numbers_gone_wrong_stay_in_their_row_of_a_batch(type_name):
    cache = KVCache([shape()], KVSettings(type_name, type_name, 8, 16), slots=3, ctx_size=256)
    for slot, n in ((0, 200), (1, 50), (2, 5)):
        q, k, v = tokens(n, seed=slot)
        feed(cache, slot, q, k * float("nan") if slot == 2 else k, v * float("nan") if slot == 2 else v, [n])
    for _ in range(2):
        q, k, v = (x.expand(3, -1, -1, -1) for x in tokens(1))
        bad = torch.tensor([1.0, 1.0, float("nan")])[:, None, None, None]
        cache.begin([0, 1, 2], 1)
        out = cache.attend(0, q, k * bad, v * bad, SCALE)
        cache.commit()
        assert out[:2].isfinite().all()
    cache.release(2)
    cache.begin([0, 1], 1)
    assert cache.attend(0, q[:2], k[:2], v[:2], SCALE).isfinite().all()


def test_a_full_context_is_refused_and_changes_nothing():
    cache = KVCache([shape()], KVSettings("tq3", "tq3", 8, 16), slots=1, ctx_size=64)
    feed(cache, 0, *tokens(60), [60])
    with pytest.raises(ContextFullError, match="65 tokens do not fit 64"):
        cache.begin([0], 5)
    assert cache.host_lengths == [60]
    cache.check_integrity()
    cache.begin([0], 4)


def test_peak_extra_memory_of_attention_does_not_grow_with_the_context(monkeypatch):
    """Attention decodes a bounded tile at a time: no decode call may return more than the tile's keys."""
    settings = KVSettings("tq3", "tq3", 8, 16)
    cache = KVCache([shape()], settings, slots=1, ctx_size=4096)
    keys, _ = cache.attention[0]
    seen = []
    real = type(keys).decode
    monkeypatch.setattr(type(keys), "decode", lambda self, *a: seen.append(real(self, *a)) or seen[-1])
    q, k, v = tokens(4000)
    feed(cache, 0, q, k, v, [1000] * 4)
    assert max(x.shape[2] for x in seen) <= 512
    assert sum(x.shape[2] for x in seen) > 4000


def test_windows_never_take_more_than_the_context():
    wide = AttentionShape(1, HEADS, KV_HEADS, DIM, window=1 << 17)
    cache = KVCache([shape(), wide], KVSettings("tq3", "tq3", 500, 900), slots=1, ctx_size=128)
    assert [side.ring.shape[2] for pair in cache.attention.values() for side in pair] == [128] * 4
    assert cache.attention[0][0].sinks.shape[2] == 128
    q, k, v = tokens(128)
    want = oracle(q, k, v, KVSettings("tq3", "tq3"), 500, 900, None)
    torch.testing.assert_close(feed(cache, 0, q, k, v, [100, 28]), want, rtol=2e-5, atol=2e-5)


class Lossless(PlainCodec):
    """Keeps rotated vectors as they are: what is left is what the transform does, and the rounding of both ways."""

    rotated = True


def test_without_loss_the_transform_changes_nothing(monkeypatch):
    monkeypatch.setattr("turbomoe.kv.cache.make_codec", lambda name, dim: Lossless("f32", torch.float32, dim))
    n = 200
    q, k, v = tokens(n)
    settings = KVSettings("tq3", "tq3", 4, 8)
    for chunks in ([n], [1] * 20 + [130] + [1] * 50):
        outs = []
        for means in (None, means_of(k, v, turning=True)):
            cache = KVCache([shape()], settings, slots=1, ctx_size=n, means=means)
            outs.append(feed(cache, 0, q, k, v, chunks))
            assert (cache.attention[0][0].scale is None) == (means is None)
        torch.testing.assert_close(*outs, rtol=2e-5, atol=2e-5)


def test_means_that_lack_a_layer_are_refused():
    with pytest.raises(IntegrityError, match="lack layer 0"):
        KVCache([shape()], KVSettings("tq3", "tq3"), slots=1, ctx_size=64, means=KVMeans({}, {}, "test"))


@pytest.mark.parametrize("type_name,codes", [("tq2", 64 // 4), ("tq3", 64 * 3 // 8), ("tq4", 64 // 2),
                                             ("tcq2.5", 64 * 5 // 16), ("tcq3", 64 * 3 // 8)])  # fmt: skip
def test_bytes_are_what_the_arithmetic_says(type_name, codes):
    ctx, sink, recent, slots = 4096, 64, 256, 2
    cache = KVCache([shape()], KVSettings(type_name, type_name, sink, recent), slots=slots, ctx_size=ctx)
    pages = slots * -(-(ctx - sink - recent) // 64) + 1
    coded_bytes = pages * 64 * KV_HEADS * (codes + 2) * 2
    exact_bytes = slots * (sink + recent) * KV_HEADS * DIM * 2 * 2
    tables = cache.pages.table.nbytes + cache.lengths.nbytes
    assert cache.nbytes() == coded_bytes + exact_bytes + tables
    values = 2 * KV_HEADS * DIM * ctx * slots
    assert cache.bits_per_value() == pytest.approx(8 * (coded_bytes + exact_bytes + tables) / values)


def test_exact_types_allocate_no_windows_and_load_no_transform():
    import subprocess
    import sys

    code = (
        "import sys, torch; from turbomoe.config import KVSettings; from turbomoe.kv.cache import KVCache;"
        "from turbomoe.kv.shape import AttentionShape as A;"
        "c = KVCache([A(0, 2, 1, 64)], KVSettings(), slots=1, ctx_size=64);"
        "assert (c.sink, c.recent) == (0, 0); x = torch.randn(1, 1, 9, 64); c.begin([0], 9);"
        "c.attend(0, x.expand(1, 2, 9, 64), x, x, 1.0);"
        "bad = [m for m in sys.modules if 'hadamard' in m or 'lloydmax' in m or 'transform' == m.split('.')[-1]];"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_recurrent_state_starts_at_zero_and_is_forgotten_on_release():
    cache = KVCache([RecurrentShape(0, (6, 4), (2, 3, 5))], KVSettings(), slots=2, ctx_size=16)
    state = cache.recurrent[0]
    rows = torch.tensor([1])
    state.write(rows, torch.ones(1, 6, 4), torch.ones(1, 2, 3, 5))
    assert state.read(rows)[1].sum() == 30
    assert state.read(torch.tensor([0]))[0].sum() == 0
    cache.release(1)
    assert state.conv.abs().sum() == 0 and state.state.abs().sum() == 0


@given(st.integers(1, 40), st.integers(1, 40), st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 99))
def test_random_windows_and_chunkings_agree_with_the_rule(sink, recent, chunks, seed):
    q, k, v = tokens(sum(chunks), seed)
    settings = KVSettings("tq4", "tq3", sink, recent)
    cache = KVCache([shape()], settings, slots=1, ctx_size=sum(chunks))
    want = oracle(q, k, v, settings, sink, recent, None)
    torch.testing.assert_close(feed(cache, 0, q, k, v, chunks), want, rtol=2e-5, atol=2e-5)


class PoolMachine(RuleBasedStateMachine):
    """Random begin, commit and release over few pages: nothing leaks, nothing is owned twice."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = KVCache([shape()], KVSettings("tq2", "tq2", 4, 8), slots=3, ctx_size=300)

    @rule(slots=st.sets(st.integers(0, 2), min_size=1), count=st.integers(1, 130))
    def advance(self, slots: set[int], count: int) -> None:
        before = list(self.cache.host_lengths)
        try:
            self.cache.begin(sorted(slots), count)
        except ContextFullError:
            assert any(before[s] + count > 300 for s in slots)
            assert self.cache.host_lengths == before
            return
        self.cache.commit()
        assert self.cache.host_lengths == [n + count * (s in slots) for s, n in enumerate(before)]

    @rule(slot=st.integers(0, 2))
    def release(self, slot: int) -> None:
        self.cache.release(slot)

    @precondition(lambda self: not any(self.cache.host_lengths))
    @rule()
    def everything_is_free(self) -> None:
        for slot in range(3):
            self.cache.release(slot)
        assert self.cache.pages.free_pages == self.cache.pages.num_pages - 1

    @invariant()
    def sound(self) -> None:
        self.cache.check_integrity()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=25)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("length", [1, 20, 63, 64, 65, 100])
@pytest.mark.parametrize("slots", [1, 2])
def test_what_was_cut_off_is_not_seen_again(kind: str, length: int, slots: int) -> None:
    """A weight of zero does not silence a NaN: a sequence that is cut back must not meet what it had."""
    cache = KVCache([shape()], KVSettings(kind, kind), slots=slots, ctx_size=256)

    def step(n: int, bad: float | None = None) -> torch.Tensor:
        q, k, v = tokens(n, seed=n)
        if bad is not None:
            v[:] = bad
        cache.begin([0], n)
        out = cache.attend(0, q, k, v, SCALE)
        cache.commit()
        return out

    step(length)
    step(70, float("nan"))
    cache.truncate(0, length)
    assert step(1).isfinite().all() and step(1).isfinite().all() and step(3).isfinite().all()
