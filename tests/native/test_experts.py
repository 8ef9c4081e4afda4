"""The fused expert: every activation, format mix, routing and shape against the reference."""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
import torch

from tests.native.support import QUANTISED, columns_for, random_experts, random_routing, relative_error
from turbomoe.native import reference
from turbomoe.native.kernels import ExpertsKernel
from turbomoe.native.layout import FORMATS
from turbomoe.native.library import GATES, Core, NativeError
from turbomoe.native.packed import MATRICES, PackedExperts
from turbomoe.native.pool import WorkerPool

BIASES = ("gate_bias", "up_bias", "down_bias")
# The last bit of h may tip it over to the next int8: one tie costs up to this much of a narrow layer's result.
ONE_TIE = 4e-3
ROUNDING = 3e-6


def run(
    pool: WorkerPool,
    layer: PackedExperts,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    many: bool = False,
) -> torch.Tensor:
    shape = layer.shape
    kernel = ExpertsKernel(
        pool, hidden=shape.hidden, width=shape.width, experts=len(layer.blobs), top=ids.shape[1], rows=len(ids)
    )
    out = torch.full(hidden.shape, float("nan"), dtype=dtype)
    kernel.run(layer, hidden, ids, weights, out, many=many)
    return out


def error_of(pool: WorkerPool, layer: PackedExperts, rows: int, top: int, seed: int, skipped: float = 0.0) -> float:
    """Relative error against the reference that rounds activations as the core does; the worse of both kernels."""
    rng = np.random.default_rng(seed)
    ids, weights = random_routing(rng, len(layer.blobs), rows, top, skipped)
    hidden = torch.from_numpy(rng.standard_normal((rows, layer.shape.hidden), dtype=np.float32))
    both = [run(pool, layer, hidden, ids, weights, many=many) for many in (False, True)]
    want = reference.run_experts(layer, hidden, ids, weights, quantised=True)
    if not want.any():
        return max(float(got.abs().max()) for got in both)
    return max(relative_error(got, want) for got in both)


@pytest.mark.parametrize("activation", sorted(GATES))
@pytest.mark.parametrize("biases", [(), BIASES, ("down_bias",)])
def test_activations_and_biases(pool: WorkerPool, level: str, activation: str, biases: tuple[str, ...]) -> None:
    formats = {"gate": "Q4_0", "up": "Q8_0", "down": "Q5_1"}
    layer = random_experts(np.random.default_rng(0), 6, 96, 160, formats, activation, biases, pool)
    errors = [error_of(pool, layer, rows, 3, rows) for rows in (1, 2, 5, 9, 30)]
    assert max(errors) < ONE_TIE and np.median(errors) < 1e-3


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_formats(pool: WorkerPool, level: str, name: str) -> None:
    hidden, width = columns_for(name, 288), columns_for(name, 64)
    layer = random_experts(np.random.default_rng(1), 5, hidden, width, dict.fromkeys(MATRICES, name), pool=pool)
    errors = [error_of(pool, layer, rows, 2, seed) for rows, seed in itertools.product((1, 3, 12, 60), range(3))]
    assert max(errors) < ONE_TIE
    assert np.median(errors) < (ROUNDING if FORMATS[name].is_float else 1e-3)


@pytest.mark.parametrize("formats", [("Q4_K", "Q5_K", "Q6_K"), ("F16", "F32", "Q8_0"), ("IQ4_NL", "MXFP4", "BF16")])
def test_mixed_formats(pool: WorkerPool, level: str, formats: tuple[str, str, str]) -> None:
    layer = random_experts(np.random.default_rng(2), 4, 512, 256, dict(zip(MATRICES, formats, strict=True)), pool=pool)
    assert max(error_of(pool, layer, rows, 4, rows) for rows in (1, 7, 33)) < ONE_TIE


def test_negative_ids_are_left_out(pool: WorkerPool, level: str) -> None:
    layer = random_experts(np.random.default_rng(3), 8, 64, 96, dict.fromkeys(MATRICES, "Q8_0"), pool=pool)
    for rows in (1, 4, 20):
        assert error_of(pool, layer, rows, 4, rows, skipped=0.5) < ONE_TIE
    hidden, weights = torch.randn(3, 64), torch.ones(3, 2)
    nothing = run(pool, layer, hidden, torch.full((3, 2), -1), weights)
    assert torch.equal(nothing, torch.zeros(3, 64))


def test_same_expert_twice_in_a_row(pool: WorkerPool) -> None:
    layer = random_experts(np.random.default_rng(4), 2, 64, 32, dict.fromkeys(MATRICES, "F32"), pool=pool)
    hidden, ids, weights = torch.randn(1, 64), torch.tensor([[1, 1]]), torch.tensor([[0.25, 0.5]])
    want = 0.75 * reference.expert(layer, 1, hidden)
    assert relative_error(run(pool, layer, hidden, ids, weights), want) < ROUNDING


def test_rows_do_not_depend_on_company(pool: WorkerPool, level: str) -> None:
    """Rows are bit-equal alone and together, however many share an expert."""
    layer = random_experts(np.random.default_rng(5), 4, 256, 512, dict.fromkeys(MATRICES, "Q4_K"), pool=pool)
    rng = np.random.default_rng(6)
    ids, weights = random_routing(rng, 4, 20, 3)
    hidden = torch.from_numpy(rng.standard_normal((20, 256), dtype=np.float32))
    together = run(pool, layer, hidden, ids, weights)
    for r in range(20):
        one = slice(r, r + 1)
        assert torch.equal(run(pool, layer, hidden[one], ids[one], weights[one]), together[one])


@pytest.mark.parametrize("many", [False, True])
def test_results_do_not_depend_on_threads(core: Core, level: str, many: bool) -> None:
    """Which worker takes which unit is chance; the result is not."""
    pools = [WorkerPool(core, threads, hot_us=100) for threads in (1, 2, 5)]
    layer = random_experts(np.random.default_rng(7), 5, 288, 160, dict.fromkeys(MATRICES, "Q5_0"))
    rng = np.random.default_rng(8)
    for rows in (1, 12, 40):
        ids, weights = random_routing(rng, 5, rows, 3)
        hidden = torch.from_numpy(rng.standard_normal((rows, 288), dtype=np.float32))
        first = run(pools[0], layer, hidden, ids, weights, many=many)
        for p in pools:
            assert all(torch.equal(run(p, layer, hidden, ids, weights, many=many), first) for _ in range(10))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(pool: WorkerPool, dtype: torch.dtype) -> None:
    layer = random_experts(np.random.default_rng(9), 4, 64, 64, dict.fromkeys(MATRICES, "Q8_0"), pool=pool)
    ids, weights = random_routing(np.random.default_rng(10), 4, 3, 2)
    hidden = torch.randn(3, 64).to(dtype)
    want = run(pool, layer, hidden.float(), ids, weights).to(dtype)
    assert torch.equal(run(pool, layer, hidden, ids, weights, dtype), want)


def test_kernel_is_reused_for_smaller_layers(pool: WorkerPool) -> None:
    big = random_experts(np.random.default_rng(11), 9, 512, 256, dict.fromkeys(MATRICES, "Q4_1"), pool=pool)
    small = random_experts(np.random.default_rng(12), 3, 96, 32, dict.fromkeys(MATRICES, "Q4_0"), pool=pool)
    kernel = ExpertsKernel(pool, hidden=512, width=256, experts=9, top=4, rows=10)
    for seed in range(20):
        layer, top = (big, 4) if seed % 3 else (small, 2)
        rng = np.random.default_rng(seed)
        ids, weights = random_routing(rng, len(layer.blobs), 1 + seed % 10, top)
        hidden = torch.from_numpy(rng.standard_normal((len(ids), layer.shape.hidden), dtype=np.float32))
        out = torch.empty_like(hidden)
        kernel.run(layer, hidden, ids, weights, out)
        assert relative_error(out, reference.run_experts(layer, hidden, ids, weights, quantised=True)) < ONE_TIE


def test_refusals_leave_out_untouched(pool: WorkerPool) -> None:
    layer = random_experts(np.random.default_rng(13), 3, 64, 32, dict.fromkeys(MATRICES, "Q8_0"), pool=pool)
    layer = PackedExperts(layer.shape, [layer.blobs[0], None, layer.blobs[2]])
    kernel = ExpertsKernel(pool, hidden=64, width=32, experts=3, top=2, rows=2)
    hidden, weights, out = torch.randn(2, 64), torch.ones(2, 2), torch.full((2, 64), 7.0)
    for ids in ([[0, 3], [0, 0]], [[0, 2], [1, 0]], [[0, 2**40], [0, 0]]):
        with pytest.raises(NativeError, match="expert id"):
            kernel.run(layer, hidden, torch.tensor(ids), weights, out)
    with pytest.raises(NativeError, match="more rows"):
        kernel.run(
            layer, torch.randn(3, 64), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2), torch.empty(3, 64)
        )
    with pytest.raises(NativeError, match="int64"):
        kernel.run(layer, hidden, torch.zeros(2, 2, dtype=torch.int32), weights, out)
    with pytest.raises(NativeError, match=r"weights must be \[2, 1\]"):
        kernel.run(layer, hidden, torch.zeros(2, 1, dtype=torch.int64), weights, out)
    with pytest.raises(NativeError, match="float32"):
        kernel.run(layer, hidden, torch.zeros(2, 2, dtype=torch.int64), weights.half(), out)
    assert torch.equal(out, torch.full((2, 64), 7.0))
    with pytest.raises(NativeError, match="No room"):
        ExpertsKernel(pool, hidden=64, width=32, experts=3, top=1 << 13, rows=1 << 13)


def random_case(pool: WorkerPool, seed: int) -> float:
    """One random layer, shape and routing; its error."""
    rng = np.random.default_rng(seed)
    names = [str(n) for n in rng.choice([*QUANTISED, "F16", "BF16", "F32"], 3)]
    if FORMATS[names[0]].is_float != FORMATS[names[1]].is_float:
        names[1] = names[0]
    wide = max(FORMATS[n].block for n in names)
    hidden, width = (int(rng.integers(1, 5)) * max(wide, 32) for _ in range(2))
    experts = int(rng.integers(1, 9))
    biases = [b for b in BIASES if rng.random() < 0.3]
    activation = str(rng.choice(sorted(GATES)))
    formats = dict(zip(MATRICES, names, strict=True))
    layer = random_experts(rng, experts, hidden, width, formats, activation, biases, pool)
    rows = int(rng.choice([1, 1, 2, 3, 4, 8, 9, 17, 40]))
    return error_of(pool, layer, rows, int(rng.integers(1, experts + 1)), seed, float(rng.choice([0, 0, 0.3])))


def check_random_cases(pool: WorkerPool, count: int) -> None:
    errors = np.array([random_case(pool, seed) for seed in range(count)])
    assert errors.max() < 2 * ONE_TIE and np.median(errors) < 1e-3


def test_random_shapes_and_routings(pool: WorkerPool, level: str) -> None:
    check_random_cases(pool, 80)


@pytest.mark.slow
def test_ten_thousand_shapes_and_routings(pool: WorkerPool, level: str) -> None:
    check_random_cases(pool, int(os.environ.get("TURBOMOE_CASES", "10000")))
