"""Row kernels: every format, level, shape and number of rows against the reference and against ggml's error."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.native.ggml_error import GGML_ERROR, TOKENS, case
from tests.native.support import QUANTISED, columns_for, random_matrix, relative_error
from turbomoe.native import reference
from turbomoe.native.kernels import LinearKernel
from turbomoe.native.layout import FORMATS
from turbomoe.native.library import Core, NativeError
from turbomoe.native.packed import PackedMatrix
from turbomoe.native.pool import WorkerPool

# Float32 sums in another order: measured below 1e-6 everywhere.
ROUNDING = 3e-6
SHAPES = [(40, 512), (33, 768), (64, 2816), (7, 32), (24, 2880), (5, 4096)]


def run(
    pool: WorkerPool, matrix: PackedMatrix, x: torch.Tensor, dtype: torch.dtype = torch.float32, *, many: bool = False
) -> torch.Tensor:
    out = torch.full((len(x), matrix.layout.rows), float("nan"), dtype=dtype)
    LinearKernel(pool, cols=x.shape[1], tokens=len(x)).run([matrix], x, [out], many=many)
    return out


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 7, 40])
def test_against_reference(pool: WorkerPool, level: str, name: str, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    for rows, cols in SHAPES:
        matrix = random_matrix(rng, name, rows, columns_for(name, cols), pool, bias=True)
        x = torch.from_numpy(rng.standard_normal((tokens, matrix.layout.cols), dtype=np.float32))
        want = reference.linear(matrix, x, quantised=True)
        for many in (False, True):
            assert relative_error(run(pool, matrix, x, many=many), want) < ROUNDING


@pytest.mark.parametrize("name", sorted(GGML_ERROR))
def test_error_no_worse_than_ggml(pool: WorkerPool, level: str, name: str) -> None:
    """On the same numbers, against exact weights and activations: 2% for chance, 1e-7 for float32 itself."""
    for tokens, ggml in zip(TOKENS, GGML_ERROR[name], strict=True):
        raw, x, exact = case(name, tokens)
        matrix = PackedMatrix.from_raw(raw, name, len(raw), x.shape[1], pool)
        for many in (False, True):
            assert relative_error(run(pool, matrix, x, many=many), exact) < 1.02 * ggml + 1e-7


def test_every_format_has_a_recorded_error() -> None:
    assert set(GGML_ERROR) == set(FORMATS)


def test_rows_do_not_depend_on_company(pool: WorkerPool, level: str) -> None:
    """A token's result is bit-equal whether it comes alone or with others, however many."""
    rng = np.random.default_rng(3)
    for name in sorted(FORMATS):
        matrix = random_matrix(rng, name, 40, columns_for(name, 1312), pool)
        x = torch.from_numpy(rng.standard_normal((17, matrix.layout.cols), dtype=np.float32))
        alone = torch.cat([run(pool, matrix, row.unsqueeze(0)) for row in x])
        for company in (*range(2, 10), 17):
            assert torch.equal(run(pool, matrix, x[:company].contiguous()), alone[:company])


def test_results_do_not_depend_on_threads(core: Core, level: str) -> None:
    """Which worker computes what is chance; no bit of the result is, with either kind of kernel."""
    rng = np.random.default_rng(4)
    pools = [WorkerPool(core, threads, hot_us=100) for threads in (1, 2, 5)]
    for name in ("Q4_K", "Q6_K", "Q8_0"):
        matrix = random_matrix(rng, name, 200, 512)
        for tokens, many in itertools.product((1, 6, 20), (False, True)):
            x = torch.from_numpy(rng.standard_normal((tokens, 512), dtype=np.float32))
            first = run(pools[0], matrix, x, many=many)
            assert all(torch.equal(run(p, matrix, x, many=many), first) for p in pools for _ in range(10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types_of_inputs_and_results(pool: WorkerPool, level: str, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(4)
    matrix = random_matrix(rng, "Q8_0", 50, 320, pool, bias=True)
    x = torch.from_numpy(rng.standard_normal((3, 320), dtype=np.float32)).to(dtype)
    want = run(pool, matrix, x.float())
    assert torch.equal(run(pool, matrix, x), want)
    assert torch.equal(run(pool, matrix, x, dtype), want.to(dtype))


@given(st.lists(st.floats(width=32, allow_nan=True), min_size=32, max_size=32))
def test_every_float_rounds_to_half_types_like_torch(pool: WorkerPool, values: list[float]) -> None:
    """An identity matrix in F32 carries values through: fp16 and bf16 results must round as torch does."""
    x = torch.tensor(values).nan_to_num(nan=float("nan"))
    identity = torch.eye(32)
    x = torch.where(torch.isfinite(x), x, torch.zeros(())).unsqueeze(0)  # inf * 0 would be NaN on other rows
    matrix = PackedMatrix.from_raw(identity.view(torch.uint8), "F32", 32, 32, pool)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(run(pool, matrix, x, dtype), (x + 0.0).to(dtype))


def test_matrices_that_share_an_input(pool: WorkerPool, level: str) -> None:
    rng = np.random.default_rng(5)
    names = ["Q4_K", "Q6_K", "F16", "Q8_0", "BF16", "Q5_K", "MXFP4", "Q4_0"]
    matrices = [random_matrix(rng, n, 8 * i + 3, 512, pool, bias=i % 2 == 0) for i, n in enumerate(names)]
    x = torch.from_numpy(rng.standard_normal((5, 512), dtype=np.float32))
    outs = [torch.empty(5, m.layout.rows) for m in matrices]
    LinearKernel(pool, cols=512, tokens=8).run(matrices, x, outs)
    for matrix, out in zip(matrices, outs, strict=True):
        assert relative_error(out, reference.linear(matrix, x, quantised=True)) < ROUNDING


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 2.0**125])
def test_what_is_no_number_stays_none(pool: WorkerPool, level: str, bad: float) -> None:
    """A NaN, an infinity or a value that int8 scales cannot hold makes its row NaN, never a plausible number."""
    rng = np.random.default_rng(6)
    for name in QUANTISED:
        matrix = random_matrix(rng, name, 9, 512, pool)
        x = torch.ones(2, 512)
        x[1, 100] = bad
        got = run(pool, matrix, x)
        assert torch.isfinite(got[0]).all() and torch.isnan(got[1]).all()


def test_zero_and_tiny_rows(pool: WorkerPool, level: str) -> None:
    rng = np.random.default_rng(8)
    matrix = random_matrix(rng, "Q4_K", 9, 512, pool)
    x = torch.zeros(2, 512)
    x[1] = 1e-38
    got = run(pool, matrix, x)
    assert torch.equal(got[0], torch.zeros(9)) and got[1].abs().max() < 1e-30


def test_refusals(pool: WorkerPool) -> None:
    rng = np.random.default_rng(9)
    matrix = random_matrix(rng, "Q8_0", 16, 64, pool)
    kernel = LinearKernel(pool, cols=64, tokens=4)
    with pytest.raises(NativeError, match="more rows"):
        kernel.run([matrix], torch.zeros(5, 64), [torch.zeros(5, 16)])
    with pytest.raises(NativeError, match=r"x must be \[4, 64\]"):
        kernel.run([matrix], torch.zeros(4, 32), [torch.zeros(4, 16)])
    with pytest.raises(NativeError, match=r"out must be \[4, 16\]"):
        kernel.run([matrix], torch.zeros(4, 64), [torch.zeros(4, 15)])
    with pytest.raises(NativeError, match="float64"):
        kernel.run([matrix], torch.zeros(4, 64, dtype=torch.float64), [torch.zeros(4, 16)])
    with pytest.raises(NativeError, match="not contiguous"):
        kernel.run([matrix], torch.zeros(64, 4).T, [torch.zeros(4, 16)])
    with pytest.raises(NativeError, match="1 to 8 matrices"):
        kernel.run([matrix] * 9, torch.zeros(1, 64), [torch.zeros(1, 16)] * 9)
    with pytest.raises(NativeError, match="No room"):
        LinearKernel(pool, cols=0, tokens=1)


def test_unknown_level(core: Core) -> None:
    with pytest.raises(NativeError, match="avx1024 does not run here"):
        core.force_level("avx1024")
