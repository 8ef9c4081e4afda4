"""The native executor against the core's arithmetic in PyTorch and float64 oracles, from store and slots."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.experts.helpers import Experts, make_experts, random_work
from turbomoe.config import ExpertSettings
from turbomoe.errors import IntegrityError, ModelError
from turbomoe.experts.arena import TAIL
from turbomoe.experts.base import ExpertWork, Phase
from turbomoe.experts.native import NativeExecutor
from turbomoe.experts.reference import ReferenceExecutor
from turbomoe.experts.runtime import ExpertRuntime
from turbomoe.experts.store import make_layout
from turbomoe.files.blocks import FORMATS
from turbomoe.native.build import BuildError, ensure_built
from turbomoe.native.kernels import open_pool
from turbomoe.native.library import load_core
from turbomoe.native.pool import WorkerPool
from turbomoe.native.reference import run_experts

E, K, H = 8, 2, 32
FLOATS = ("F32", "F16", "BF16")
MIXED = {1: ("Q4_0", "Q4_0", "Q8_0"), 4: ("F32",) * 3, 5: ("Q5_1", "Q8_0", "F16")}


@pytest.fixture(scope="module")
def pool() -> WorkerPool:
    try:
        ensure_built()
    except BuildError as error:
        pytest.skip(str(error))
    found = open_pool(threads=2)
    assert found is not None
    return found


def compute(executor: NativeExecutor, layer: int, hidden, ids, weights) -> torch.Tensor:
    out = torch.full_like(hidden, float("nan"))
    executor.submit(ExpertWork(layer, Phase.DECODE, hidden, ids, weights, out))
    executor.wait()
    return out


def error(found: torch.Tensor, wanted: np.ndarray | torch.Tensor) -> float:
    """Root mean square of the difference, relative to that of what is wanted."""
    wanted = np.asarray(wanted, dtype=np.float64)
    return float(np.linalg.norm(found.double().numpy() - wanted) / np.linalg.norm(wanted))


def check(made: Experts, executor: NativeExecutor, layer: int, rows: int, top_k: int, seed: int = 1) -> None:
    layout = made.store.layout(layer)
    hidden, ids, weights = random_work(rows, layout.num_experts, top_k, layout.hidden, seed)
    found = compute(executor, layer, hidden, ids, weights)
    packed = executor._layers[made.store.positions[layer]]
    # A value on a rounding edge may fall to either side: one step of int8 in one of hundreds.
    assert error(found, run_experts(packed, hidden, ids, weights, quantised=True)) < 2e-3
    # Rounding activations to 8 bits twice (hidden, then the product of gate and up) costs a part in a hundred.
    assert error(found, made.oracle(layer, hidden, ids, weights)) < 0.02


@pytest.mark.parametrize("place", ["gate", "up", "down", "all"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_block_format_in_every_part(fmt: str, place: str, pool: WorkerPool) -> None:
    other = "F32" if fmt in FLOATS else "Q8_0"
    formats = tuple(fmt if place in (name, "all") else other for name in ("gate", "up", "down"))
    made = make_experts({0: formats}, num_experts=3, hidden=256, width=256, planar=True, pool=pool)
    check(made, NativeExecutor(made.store, pool), 0, rows=3, top_k=2)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("biases", [False, True])
def test_activations_and_biases(activation: str, biases: bool, pool: WorkerPool) -> None:
    made = make_experts({3: ("Q8_0",) * 3}, activation=activation, biases=biases, planar=True, pool=pool)
    check(made, NativeExecutor(made.store, pool), 3, rows=5, top_k=3)


@pytest.fixture(scope="module")
def mixed(pool: WorkerPool) -> Experts:
    return make_experts(
        {1: ("Q4_0", "Q4_0", "Q8_0"), 4: ("F32",) * 3, 5: ("Q5_1", "Q8_0", "F16")}, planar=True, pool=pool
    )


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 9, 16, 31, 33, 64, 512, 513, 1030])
def test_any_number_of_rows_in_one_executor(rows: int, mixed: Experts, pool: WorkerPool) -> None:
    executor = NativeExecutor(mixed.store, pool)
    for layer, count, top_k in ((1, 1, 1), (4, rows, K), (5, rows, 8), (1, 1, 2)):  # room grows, layers alternate
        layout = mixed.store.layout(layer)
        hidden, ids, weights = random_work(count, E, top_k, layout.hidden, rows)
        found = compute(executor, layer, hidden, ids, weights)
        packed = executor._layers[mixed.store.positions[layer]]
        assert error(found, run_experts(packed, hidden, ids, weights, quantised=True)) < 2e-3


def test_no_rows_and_no_experts(mixed: Experts, pool: WorkerPool) -> None:
    executor = NativeExecutor(mixed.store, pool)
    nothing = compute(executor, 4, torch.empty(0, H), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2))
    assert nothing.shape == (0, H)
    zeros = compute(executor, 4, torch.ones(3, H), torch.empty(3, 0, dtype=torch.int64), torch.empty(3, 0))
    assert torch.equal(zeros, torch.zeros(3, H))


def test_without_a_core_pytorch_computes_the_same_blobs(mixed: Experts) -> None:
    plain = make_experts(MIXED, planar=True)
    for layer in plain.store.layers:
        assert all(torch.equal(plain.store.blob(layer, e), mixed.store.blob(layer, e)) for e in range(E))
    work = random_work(4, E, K, H, 1)
    assert error(compute(NativeExecutor(plain.store, None), 1, *work), plain.oracle(1, *work)) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_and_weights(dtype: torch.dtype, mixed: Experts, pool: WorkerPool) -> None:
    hidden, ids, weights = random_work(6, E, K, H, 3)
    found = compute(NativeExecutor(mixed.store, pool), 1, hidden.to(dtype), ids, weights.to(dtype))
    assert found.dtype == dtype
    assert error(found.float(), mixed.oracle(1, hidden, ids, weights)) < 0.03


def test_submit_starts_and_wait_finishes(mixed: Experts) -> None:
    """With no thread but the caller's, nothing can have happened before the caller waits."""
    load_core()
    alone = open_pool(threads=1)
    executor, (hidden, ids, weights) = NativeExecutor(mixed.store, alone), random_work(2, E, K, H, 0)
    out = torch.full_like(hidden, float("nan"))
    work = ExpertWork(1, Phase.DECODE, hidden, ids, weights, out)
    with pytest.raises(IntegrityError, match="before it was submitted"):
        executor.wait()
    executor.submit(work)
    assert out.isnan().all()
    with pytest.raises(IntegrityError, match="before the previous"):
        executor.submit(work)
    executor.wait()
    assert not out.isnan().any()


@pytest.mark.parametrize("bad", [-1, E, 1 << 40])
def test_ids_that_are_no_experts_are_refused_and_leave_the_executor_usable(
    bad: int, mixed: Experts, pool: WorkerPool
) -> None:
    executor, (hidden, ids, weights) = NativeExecutor(mixed.store, pool), random_work(2, E, K, H, 0)
    with pytest.raises(IntegrityError):
        compute(executor, 1, hidden, ids.index_fill(1, torch.tensor([0]), bad), weights)
    with pytest.raises(IntegrityError):
        compute(executor, 1, hidden[:, :16], ids, weights)
    check(mixed, executor, 1, rows=2, top_k=2)


def test_raw_blobs_and_planes_each_have_their_executor(mixed: Experts, pool: WorkerPool) -> None:
    raw = make_experts({0: ("Q8_0",) * 3})
    with pytest.raises(IntegrityError, match="not packed as planes"):
        NativeExecutor(raw.store, pool)
    assert isinstance(ExpertRuntime(raw.store, ExpertSettings(), pool=pool)._executor, ReferenceExecutor)
    assert isinstance(ExpertRuntime(mixed.store, ExpertSettings(), pool=pool)._executor, NativeExecutor)
    with pytest.raises(ModelError, match="Expert biases in F16"):
        parts = [("gate", (64, 32), "F32"), ("up", (64, 32), "F32"), ("down", (32, 64), "F32")]
        make_layout(0, 2, 32, 64, "silu", [*parts, ("up_bias", (64,), "F16")], planar=True)


# -- slots on the CPU --------------------------------------------------------------------------------------------


def cached(made: Experts, pool: WorkerPool) -> ExpertRuntime:
    column = sum(layout.blob_bytes for layout in made.store.layouts)
    size = 8 * column + TAIL * len(made.store.size_classes)
    return ExpertRuntime(made.store, ExpertSettings(cache=size), "cpu", K, pool=pool)


def steps(runtime: ExpertRuntime, count: int) -> torch.Tensor:
    out = []
    for seed in range(count):
        runtime.begin_step(Phase.DECODE)
        out += [runtime.run(layer, *random_work(2, E, K, H, seed)) for layer in runtime.store.layers]
        runtime.end_step()
    return torch.stack(out)


def test_tokens_are_the_same_with_and_without_a_cache(mixed: Experts, pool: WorkerPool) -> None:
    with_cache, without = cached(mixed, pool), ExpertRuntime(mixed.store, ExpertSettings(), "cpu", K, pool=pool)
    assert with_cache.cache is not None
    assert torch.equal(steps(with_cache, 12), steps(without, 12))
    assert with_cache.cache.counters.hit_rate(Phase.DECODE) > 0.3
    with_cache.check_integrity(compare_bytes=True)
    assert not with_cache.cache.slots.pins.any()


def test_hits_are_computed_from_their_slots(mixed: Experts, pool: WorkerPool) -> None:
    runtime = cached(mixed, pool)
    assert runtime.cache is not None
    before = steps(runtime, 12)[-3:]
    runtime.begin_step(Phase.DECODE)
    for slots in runtime.cache.slots.pools.values():
        slots.arena.zero_()
    args = random_work(2, E, K, H, 11)
    held = [
        all(runtime.cache.slots.located(layer)[e] >= 0 for e in args[1][0].tolist()) for layer in mixed.store.layers
    ]
    assert any(held)
    for position, layer in enumerate(mixed.store.layers):
        row = runtime.run(layer, *args)[0]
        if held[position]:
            assert torch.equal(row, torch.zeros(H)) and before[position][0].any()
    runtime.end_step()


PROBE = """
import sys, torch
from turbomoe.config import ExpertSettings
from turbomoe.experts.runtime import ExpertRuntime
from turbomoe.experts.store import StoreBuilder, make_layout
parts = [("gate", (32, 32), "F32"), ("up", (32, 32), "F32"), ("down", (32, 32), "F32")]
builder = StoreBuilder([make_layout(0, 1, 32, 32, "silu", parts, planar=True)])
for name, _, _ in parts:
    builder.fill(0, 0, name, torch.zeros(4096, dtype=torch.uint8))
runtime = ExpertRuntime(builder.finish(), ExpertSettings())
runtime.run(0, torch.ones(1, 32), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
print(*sorted(m for m in sys.modules if m.startswith("turbomoe.experts.")))
"""


def test_off_is_off_on_the_native_path_too() -> None:
    said = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True).stdout.split()
    assert sorted(name.removeprefix("turbomoe.experts.") for name in said) == [
        "arena", "base", "native", "outputs", "reference", "runtime", "store"
    ]  # fmt: skip
