"""The reference executor against float64 oracles: formats, rows, biases, activations, order of the sum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.experts.helpers import Experts, make_experts, random_work
from turbomoe.errors import IntegrityError
from turbomoe.experts.base import ExpertWork, Phase
from turbomoe.experts.reference import ReferenceExecutor, expert_forward, group_by_expert
from turbomoe.experts.store import StoreBuilder, make_layout
from turbomoe.files.blocks import FORMATS

# Float32 against float64: a sum of n products errs by a few parts in 1e7 of its size; measured at most 4e-7 here.
CLOSE = 2e-6


def compute(executor: ReferenceExecutor, layer: int, hidden, ids, weights, phase: Phase = Phase.DECODE) -> torch.Tensor:
    out = torch.full_like(hidden, float("nan"))
    executor.submit(ExpertWork(layer, phase, hidden, ids, weights, out))
    executor.wait()
    return out


def error(found: torch.Tensor, wanted: np.ndarray) -> float:
    """Largest difference, relative to the largest wanted value."""
    return float(np.abs(found.double().numpy() - wanted).max() / np.abs(wanted).max())


def check(made: Experts, layer: int, rows: int, top_k: int, seed: int = 1) -> None:
    layout = made.store.layout(layer)
    hidden, ids, weights = random_work(rows, layout.num_experts, top_k, layout.hidden, seed)
    found = compute(ReferenceExecutor(made.store), layer, hidden, ids, weights)
    assert error(found, made.oracle(layer, hidden, ids, weights)) < CLOSE


@pytest.mark.parametrize("place", ["gate", "up", "down"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_block_format_in_every_part(fmt: str, place: str) -> None:
    formats = tuple(fmt if place == name else "F32" for name in ("gate", "up", "down"))
    check(make_experts({0: formats}, num_experts=3, hidden=256, width=256), 0, rows=3, top_k=2)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("biases", [False, True])
def test_activations_and_biases(activation: str, biases: bool) -> None:
    check(make_experts({0: ("F32", "F16", "BF16")}, activation=activation, biases=biases), 0, rows=5, top_k=3)


MIXED = make_experts({1: ("Q4_0", "Q4_0", "Q8_0"), 4: ("F32",) * 3, 5: ("Q4_0", "Q4_0", "Q8_0")})


@pytest.mark.parametrize("rows", range(1, 41))
def test_rows_1_to_40(rows: int) -> None:
    check(MIXED, (1, 4, 5)[rows % 3], rows, top_k=1 + rows % 8, seed=rows)


def test_no_rows_and_no_experts() -> None:
    executor = ReferenceExecutor(MIXED.store)
    nothing = compute(executor, 4, torch.empty(0, 32), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2))
    assert nothing.shape == (0, 32)
    zeros = compute(executor, 4, torch.ones(3, 32), torch.empty(3, 0, dtype=torch.int64), torch.empty(3, 0))
    assert torch.equal(zeros, torch.zeros(3, 32))


@pytest.mark.parametrize("parts", [1, 2, 4, 16])
@pytest.mark.parametrize("rows", [1, 7])
def test_a_dense_ffn_split_into_experts_that_are_all_active_is_the_dense_ffn(parts: int, rows: int) -> None:
    hidden, width = 64, 256
    gate, up, down = (torch.randn(shape) / 8 for shape in ((width, hidden), (width, hidden), (hidden, width)))
    step = width // parts
    names = [("gate", (step, hidden), "F32"), ("up", (step, hidden), "F32"), ("down", (hidden, step), "F32")]
    builder = StoreBuilder([make_layout(0, parts, hidden, step, "silu", names)])
    for e in range(parts):
        cut = slice(e * step, (e + 1) * step)
        for name, weight in (("gate", gate[cut]), ("up", up[cut]), ("down", down[:, cut].contiguous())):
            builder.fill(0, e, name, weight.view(-1).view(torch.uint8))
    x = torch.randn(rows, hidden)
    ids = torch.arange(parts).expand(rows, parts)
    found = compute(ReferenceExecutor(builder.finish()), 0, x, ids, torch.ones(rows, parts))
    x, gate, up, down = x.double(), gate.double(), up.double(), down.double()
    dense = (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
    assert error(found, dense.numpy()) < CLOSE


def naive(made: Experts, layer: int, hidden, ids, weights, order: list[int]) -> torch.Tensor:
    """The same terms, added one row and one k at a time in ``order``."""
    layout = made.store.layout(layer)
    terms = torch.empty(*ids.shape, layout.hidden)
    for expert, where in group_by_expert(ids):
        result = expert_forward(layout, made.store.blob(layer, expert), hidden[where // ids.shape[1]])
        terms.view(-1, layout.hidden)[where] = result * weights.reshape(-1, 1)[where]
    total = terms[:, order[0]].clone()
    for k in order[1:]:
        total += terms[:, k]
    return total


@given(rows=st.integers(1, 12), top_k=st.integers(1, 8), seed=st.integers(0, 1 << 20))
@settings(max_examples=40)
def test_terms_are_added_in_routing_order(rows: int, top_k: int, seed: int) -> None:
    hidden, ids, weights = random_work(rows, 8, top_k, 32, seed)
    found = compute(ReferenceExecutor(MIXED.store), 1, hidden, ids, weights)
    assert torch.equal(found, naive(MIXED, 1, hidden, ids, weights, list(range(top_k))))


def test_another_order_would_give_other_bits() -> None:
    hidden, ids, weights = random_work(12, 8, 8, 32, 0)
    forward, backward = (
        naive(MIXED, 1, hidden, ids, weights, order) for order in (list(range(8)), list(range(8))[::-1])
    )
    assert not torch.equal(forward, backward)


def test_chunking_changes_nothing_beyond_float_rounding() -> None:
    hidden, ids, weights = random_work(40, 8, 3, 32, 5)
    executor = ReferenceExecutor(MIXED.store)
    whole = compute(executor, 1, hidden, ids, weights, Phase.PREFILL)
    for size in (1, 7, 16):
        chunks = zip(hidden.split(size), ids.split(size), weights.split(size), strict=True)
        pieces = [compute(executor, 1, *chunk) for chunk in chunks]
        assert error(torch.cat(pieces), whole.double().numpy()) < CLOSE


def test_a_workspace_of_a_larger_call_does_not_leak_into_a_smaller_one() -> None:
    executor = ReferenceExecutor(MIXED.store)
    large, small = random_work(40, 8, 8, 32, 2), random_work(2, 8, 3, 32, 3)
    fresh = compute(ReferenceExecutor(MIXED.store), 1, *small)
    assert executor.nbytes == 0
    compute(executor, 1, *large)
    held = executor.nbytes
    assert torch.equal(compute(executor, 1, *small), fresh)
    assert executor.nbytes == held == 40 * 8 * 32 * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_are_computed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    hidden, ids, weights = random_work(6, 8, 2, 32, 4)
    executor = ReferenceExecutor(MIXED.store)
    halves = hidden.to(dtype), ids, weights.to(dtype)
    exact = compute(executor, 1, halves[0].float(), ids, halves[2].float())
    assert torch.equal(compute(executor, 1, *halves), exact.to(dtype))


def test_inputs_are_left_alone_and_may_be_strided_or_repeated() -> None:
    hidden, ids, weights = random_work(4, 8, 2, 64, 9)
    strided = hidden[:, ::2]
    before = hidden.clone(), ids.clone(), weights.clone()
    executor = ReferenceExecutor(MIXED.store)
    found = compute(executor, 1, strided, ids.T.contiguous().T, weights)
    assert torch.equal(found, compute(executor, 1, strided.contiguous(), ids, weights))
    assert all(torch.equal(a, b) for a, b in zip(before, (hidden, ids, weights), strict=True))
    twice = compute(executor, 1, strided, ids[:, :1].expand(4, 2), torch.full((4, 2), 0.5))
    once = compute(executor, 1, strided, ids[:, :1], torch.ones(4, 1))
    assert error(twice, once.double().numpy()) < CLOSE


def test_it_runs_inside_and_outside_inference_mode() -> None:
    executor, work = ReferenceExecutor(MIXED.store), random_work(3, 8, 2, 32, 9)
    with torch.inference_mode():
        inside = compute(executor, 1, *work)
    assert torch.equal(compute(executor, 1, work[0].requires_grad_(), *work[1:]), inside)


INTEGERS = [torch.int64, torch.int64, torch.int32, torch.int16, torch.uint8]
X, IDS, W = torch.zeros(3, 32), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)


@pytest.mark.parametrize(
    ("hidden", "ids", "weights", "said"),
    [
        (torch.zeros(3, 31), IDS, W, "shapes"),
        (X, IDS[:2], W[:2], "shapes"),
        (X, IDS, W[:, :1], "shapes"),
        (X, IDS[:, 0], W[:, 0], "shapes"),
        (X, IDS.float(), W, "float32"),
        (X[0], IDS[0], W[0], "shapes"),
        (X, IDS - 1, W, "outside 0..7"),
        (X, IDS + 8, W, "outside 0..7"),
    ],
)
def test_misshapen_work_is_refused_and_the_executor_stays_usable(hidden, ids, weights, said: str) -> None:
    executor = ReferenceExecutor(MIXED.store)
    with pytest.raises(IntegrityError, match=said):
        compute(executor, 1, hidden, ids, weights)
    assert compute(executor, 1, X, IDS, W).shape == (3, 32)


@given(st.data())
@settings(max_examples=500)
def test_random_work_is_computed_or_refused_and_never_anything_else(data: st.DataObject) -> None:
    size = st.sampled_from([0, 1, 2, 3, 3, 3, 32])
    shape = st.lists(size, min_size=1, max_size=3)

    def tensor(usual: tuple[int, ...]) -> torch.Tensor:
        spoiled = data.draw(st.integers(0, 7)) == 0
        return torch.randn(data.draw(shape) if spoiled else usual)

    hidden, weights = tensor((3, 32)), tensor((3, 2))
    ids = (tensor((3, 2)) * data.draw(st.sampled_from([1, 1, 10]))).abs().to(data.draw(st.sampled_from(INTEGERS)))
    executor, out = ReferenceExecutor(MIXED.store), torch.full_like(hidden, float("nan"))
    fits = hidden.shape == (3, 32) and ids.shape == weights.shape and ids.dim() == 2 and len(ids) == 3
    fits = fits and (ids.numel() == 0 or int(ids.max()) < 8)
    try:
        executor.submit(ExpertWork(1, Phase.DECODE, hidden, ids, weights, out))
    except IntegrityError:
        assert hidden.shape != (3, 32) or not fits
        return
    executor.wait()
    assert not out.isnan().any()


def test_one_submission_at_a_time() -> None:
    executor, work = ReferenceExecutor(MIXED.store), ExpertWork(1, Phase.DECODE, X, IDS, W, torch.empty(3, 32))
    with pytest.raises(IntegrityError, match="before it was submitted"):
        executor.wait()
    executor.submit(work)
    with pytest.raises(IntegrityError, match="before the previous"):
        executor.submit(work)
    executor.wait()
    executor.submit(work)
    executor.wait()
