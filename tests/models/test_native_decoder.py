"""Decoder layers in the C core against the body they stand for, over float weights: only the order of sums differs."""

from functools import cache

import pytest
import torch
from torch import nn

from tests.tiny_models import q8_0, tiny_model, tokens, write_gguf
from turbomoe.config import EngineSettings, KVSettings
from turbomoe.engine.runner import ModelRunner
from turbomoe.experts.base import Phase
from turbomoe.kv.means import KVMeans
from turbomoe.models import load_model
from turbomoe.models.fast import make_body
from turbomoe.models.packed import PackedLinear
from turbomoe.native.build import ensure_built
from turbomoe.native.library import load_core
from turbomoe.native.packed import PackedMatrix
from turbomoe.native.shared import shared_pool

FAMILIES = ["llama", "qwen2", "qwen3", "qwen3moe"]
HEADS = {"hidden_size": 192, "head_dim": 32, "num_attention_heads": 6, "num_key_value_heads": 2}
TYPES = [("f32", "f32"), ("bf16", "bf16"), ("f16", "f32"), ("q8_0", "q8_0"), ("tq2", "tq2"), ("tq3", "tq3"),
         ("tq4", "tq4"), ("q8_0", "tq3"), ("bf16", "tq2"), ("tq4", "f32"), ("tcq2", "tcq2"), ("tcq2.5", "tcq2.5"),
         ("tcq3", "tcq3"), ("tcq4", "tcq4"), ("tcq4", "tcq2.5"), ("tq3", "tcq2"), ("tcq3", "q8_0")]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def core():
    ensure_built()
    if shared_pool() is None:
        pytest.skip("the C core could not be opened")


def pack(shell: nn.Module) -> None:
    """Every projection as a packed matrix of floats: exact, and computed by the core."""
    for path, module in list(shell.named_modules()):
        if type(module) is nn.Linear and path.endswith("_proj"):
            raw = module.weight.detach().contiguous().view(-1).view(torch.uint8)
            bias = None if module.bias is None else module.bias.detach().float().contiguous()
            matrix = PackedMatrix.from_raw(raw, "F32", *module.weight.shape, shared_pool(), bias)
            shell.set_submodule(path, PackedLinear(matrix, shared_pool()))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    @cache
    def load(family, **changes):
        path = write_gguf(tiny_model(family, **(HEADS | changes)), tmp_path_factory.mktemp(family) / "model.gguf")
        model = load_model(path, EngineSettings(dtype="float32", body="stock"))
        pack(model.shell)
        return model

    return load


class Arm:
    """A runner whose body decodes in the C core, or not."""

    def __init__(self, model, native, kv, ctx_size, slots=1, means=None):
        self.model, self.body, self.calls = model, make_body(model.family, model.shell, model.layers), 0
        assert self.body.decoder is not None
        self.slot, self.runner = slots - 1, ModelRunner(model, kv, slots=slots, ctx_size=ctx_size, means=means)
        if native:
            self._run, self.body.decoder.run = self.body.decoder.run, self._count
        else:
            self.body.decoder = None

    def _count(self, *args):
        self.calls += 1
        self._run(*args)

    def forward(self, ids):
        self.model.body = self.body
        phase = Phase.DECODE if ids.shape[1] == 1 else Phase.PREFILL
        return self.runner.forward([self.slot], ids, phase, keep=0)

    def stored(self):
        for pair in self.runner.memory.attention.values():
            for side in pair:
                yield from (side.sinks, side.ring, *side.planes)


def means_of(model):
    g = torch.Generator().manual_seed(3)
    *sides, scales = [
        {s.layer: torch.randn(s.kv_heads, s.head_dim, generator=g) for s in model.layers} for _ in range(3)
    ]
    turning = torch.rand(model.layers[0].head_dim // 2 - 3, generator=g)
    return KVMeans(*sides, model.identity, {i: s.exp() for i, s in scales.items()}, turning)


def assert_alike(model, kv, ids, chunks, **more):
    """Both decode the same tokens over the same memory: what one step stores differs, if at all, by a rounding."""
    native, plain = (Arm(model, n, kv, ids.shape[1], **more) for n in (True, False))
    errors = []
    for part in ids.split(chunks, 1):
        for a, b in zip(native.stored(), plain.stored(), strict=True):
            if a.dtype.is_floating_point:
                # A vector in a wrong place would differ by its own size; the next bf16 is up to 2^-7 away.
                assert (a.float() - b.float()).abs().max() <= 2**-7 * b.float().abs().max() if b.numel() else True
            a.copy_(b)
        got, want = native.forward(part), plain.forward(part)
        if part.shape[1] == 1:
            errors.append(float((got - want).abs().max() / want.abs().max()))
    assert native.calls >= chunks.count(1) and plain.calls == 0
    # Only the new token's own keys and values can be rounded to another neighbour, and seldom are.
    assert sorted(errors)[len(errors) // 2] < 1e-5 and max(errors) < (2e-5 if set(types_of(kv)) == {"f32"} else 5e-3)


def types_of(kv):
    return kv.type_k, kv.type_v


@pytest.mark.parametrize("types", TYPES, ids="-".join)
@pytest.mark.parametrize("means", [False, True], ids=["plain", "means"])
def test_types_and_windows(models, types, means):
    """Past the ends of sinks, ring and a page, and from the very first token."""
    model, kv = models("llama"), KVSettings(*types, 4, 8)
    table = means_of(model) if means else None
    for chunks in ([1] * 30, [70] + [1] * 30, [135] + [1] * 10):
        assert_alike(model, kv, tokens(sum(chunks)), chunks, means=table)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("types", [("f32", "f32"), ("tq3", "tq3")], ids="-".join)
def test_families_and_a_far_slot(models, family, types):
    assert_alike(models(family), KVSettings(*types, 0, 16), tokens(60), [20] + [1] * 40, slots=3)


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (16, 1), (8, 2)])
@pytest.mark.parametrize("dim", [16, 64, 128, 256])
def test_head_shapes(models, heads, dim):
    sizes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": dim}
    model = models("qwen3", **sizes, hidden_size=64)
    # A trellis wants heads of 32 values or more.
    for types in [("tq4", "tq3"), ("f32", "f32")] + [("tcq3", "tcq2"), ("tcq2.5", "tcq4")] * (dim >= 32):
        assert_alike(model, KVSettings(*types, 2, 4), tokens(24), [12] + [1] * 12)


def test_many_parts_meet_in_one_softmax(models):
    """A context long enough to be split between threads; every part sees codes, one the windows."""
    model = models("llama", num_hidden_layers=1, max_position_embeddings=8192)
    pool = shared_pool()
    assert pool is not None
    chunks = [2500, 2500] + [1] * 3
    assert_alike(model, KVSettings("tq3", "tq4", 16, 64), tokens(sum(chunks)), chunks, means=means_of(model))


@pytest.mark.parametrize("level", ["avx512", "avx2", "portable"])
def test_levels(models, level):
    core = load_core()
    assert core is not None
    if level not in core.levels():
        pytest.skip(f"this processor does not run {level}")
    core.force_level(level)
    try:
        for types in (("q8_0", "tq2"), ("tq4", "tq3"), ("f16", "bf16"), ("tcq2", "tcq3"), ("tcq4", "tcq2.5")):
            assert_alike(models("llama"), KVSettings(*types, 4, 8), tokens(90), [70] + [1] * 20)
    finally:
        core.force_level("auto")


def test_other_steps_are_left_to_the_body(models):
    """Batches, chunks, calibration and memories that the core cannot read."""
    model = models("llama")
    body = make_body("llama", model.shell, model.layers)
    x = torch.zeros(1, 192)

    def program(kv, slots=(0,), count=1, x=x, observer=None):
        runner = ModelRunner(model, kv, slots=2, ctx_size=64)
        runner.memory.observer = observer
        return body.decoder.program(runner.memory, runner.memory.begin(list(slots), count), x)

    assert program(KVSettings("tq3", "tq3")) is not None
    assert program(KVSettings("tq3", "tq3"), slots=(0, 1)) is None
    assert program(KVSettings("tq3", "tq3"), count=2) is None
    assert program(KVSettings("tq3", "tq3", 4, 0)) is None
    assert program(KVSettings("tq3", "tq3"), x=x.bfloat16()) is None
    assert program(KVSettings("tq3", "tq3"), observer=lambda *_: None) is None


def test_stale_rows_are_not_read(models):
    """What lies beyond a sequence's end may be another's, or NaN."""
    model, ids = models("llama"), tokens(40)
    for kv in (KVSettings("tq3", "bf16", 4, 8), KVSettings("f32", "bf16")):
        clean, poisoned = Arm(model, True, kv, 40), Arm(model, True, kv, 40)
        for stored in poisoned.stored():
            stored.fill_(float("nan") if stored.dtype.is_floating_point else 255)
        for part in ids.split(1, 1):
            assert torch.equal(clean.forward(part), poisoned.forward(part))


@pytest.mark.parametrize("dim", [40, 288])
def test_heads_that_the_core_does_not_read_run_in_the_body(tmp_path, dim):
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": dim}
    path = write_gguf(tiny_model("qwen3", **sizes), tmp_path / "model.gguf", pick=q8_0)
    model = load_model(path, EngineSettings())
    assert model.body is not None and model.body.decoder is None
    runner = ModelRunner(model, KVSettings(), slots=1, ctx_size=8)
    assert runner.forward([0], tokens(1), Phase.DECODE).isfinite().all()
