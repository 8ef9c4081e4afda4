"""The parts of the training code against plain formulas: rounding, dispatch, delta rule, optimiser, schedule."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from deltanet import CHUNK, UnitInverse, delta_rule
from feedforward import to_q4_0
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from moe import Experts, balance_loss, blocked, dispatch
from muon import Muon, orthogonal
from optimisers import DECAY_FROM, WARMUP, learning_rate
from routing import Routing, transfer
from torch import Tensor


@pytest.mark.parametrize("scale", [1e-6, 0.02, 3.0])
def test_rounding_is_what_the_file_will_hold(scale: float) -> None:
    weight = torch.randn(5, 3, 96) * scale
    weight[0, 0, :32] = 0
    packed = quants.quantize(weight.numpy(), GGMLQuantizationType.Q4_0)
    wanted = torch.from_numpy(quants.dequantize(packed, GGMLQuantizationType.Q4_0))
    assert torch.allclose(to_q4_0(weight), wanted, rtol=1e-6, atol=scale * 1e-6)
    assert (wanted - weight).norm() > 0.01 * weight.norm()


def test_the_gradient_passes_the_rounding_unchanged() -> None:
    weight = torch.randn(4, 32, requires_grad=True)
    to_q4_0(weight).square().sum().backward()
    assert torch.allclose(weight.grad, 2 * to_q4_0(weight.detach()))


ROUTES = st.integers(1, 6).flatmap(
    lambda experts: st.tuples(
        st.just(experts),
        st.integers(1, experts).flatmap(
            lambda active: st.lists(
                st.permutations(range(experts)).map(lambda order: order[:active]), min_size=1, max_size=20
            )
        ),
        st.sampled_from([1, 4, 8]),
    )
)


@given(ROUTES)
def test_every_choice_has_a_row_of_its_own_in_its_experts_run(case: tuple[int, list[list[int]], int]) -> None:
    experts, routes, align = case
    ids = torch.tensor(routes)
    plan = dispatch(ids, experts, align)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), plan.ends[:-1].long()])
    flat = ids.flatten()
    assert plan.rows.unique().numel() == flat.numel()
    assert (plan.rows >= starts[flat]).all() and (plan.rows < plan.ends[flat]).all()
    assert (plan.ends % align == 0).all() and plan.ends[-1] == len(plan.slots)
    assert torch.equal(plan.counts, flat.bincount(minlength=experts))
    filled = plan.slots < flat.numel()
    assert torch.equal(plan.slots[plan.rows], torch.arange(flat.numel())) and int(filled.sum()) == flat.numel()


def naive_experts(module: Experts, x: Tensor, shares: Tensor, ids: Tensor) -> Tensor:
    rows = []
    for token, weights, chosen in zip(x, shares, ids, strict=True):
        total = torch.zeros_like(token)
        for weight, expert in zip(weights, chosen, strict=True):
            gate, up = (module.gate_up_proj[expert] @ token).chunk(2)
            total = total + weight * (module.down_proj[expert] @ (torch.nn.functional.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows)


@given(ROUTES)
@settings(max_examples=25)
def test_grouped_experts_equal_one_token_at_a_time(case: tuple[int, list[list[int]], int]) -> None:
    experts, routes, align = case
    ids = torch.tensor(routes)
    module = Experts(experts, 6, 4, blocked(align)).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    x, shares = torch.randn(len(ids), 6).double().requires_grad_(), torch.rand(ids.shape).double().requires_grad_()
    inputs = [x, shares, *module.parameters()]
    out = module(x, shares, dispatch(ids, experts, align), (module.gate_up_proj, module.down_proj))
    wanted = naive_experts(module, x, shares, ids)
    assert torch.allclose(out, wanted, rtol=1e-4, atol=1e-5)  # the sum over experts is float32
    weight = torch.randn_like(wanted)
    found = torch.autograd.grad((out * weight).sum(), inputs)
    for one, other in zip(found, torch.autograd.grad((wanted * weight).sum(), inputs), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


def test_the_balance_loss_is_one_for_uniform_and_grows_to_the_number_of_experts() -> None:
    even = dispatch(torch.arange(8).view(4, 2), 8, 1)
    assert float(balance_loss(torch.full((4, 8), 1 / 8), even)) == pytest.approx(1)
    collapsed = torch.zeros(4, 8)
    collapsed[:, 3] = 1
    assert float(balance_loss(collapsed, dispatch(torch.full((4, 1), 3), 8, 1))) == pytest.approx(8)


@pytest.mark.parametrize("size", [2, 8, 64])
def test_the_inverse_of_a_unit_triangle_and_its_gradient(size: int) -> None:
    lower = torch.randn(3, size, size, dtype=torch.float64).tril(-1) * size**-0.5
    lower.requires_grad_()
    found = UnitInverse.apply(lower)
    wanted = torch.linalg.inv(torch.eye(size, dtype=torch.float64) + lower)
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-9)
    weight = torch.randn_like(wanted)
    gradients = [torch.autograd.grad((one * weight).sum(), lower)[0].tril(-1) for one in (found, wanted)]
    assert torch.allclose(*gradients, rtol=1e-7, atol=1e-7)


def recurrence(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    state = torch.zeros(*key.shape[:2], key.shape[-1], value.shape[-1], dtype=key.dtype)
    out = []
    for t in range(key.shape[2]):
        state = state * decay[:, :, t, None, None].exp()
        known = torch.einsum("bhk,bhkv->bhv", key[:, :, t], state)
        fresh = (value[:, :, t] - known) * beta[:, :, t, None]
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, :, t], fresh)
        out.append(torch.einsum("bhk,bhkv->bhv", query[:, :, t], state))
    return torch.stack(out, 2)


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("repeated", [False, True])
def test_the_chunked_delta_rule_equals_the_recurrence(chunks: int, repeated: bool) -> None:
    time, dim = chunks * CHUNK, 8
    query, key = (torch.nn.functional.normalize(torch.randn(2, 3, time, dim), dim=-1) for _ in range(2))
    if repeated:  # where series of powers would lose all digits
        key = key[:, :, :1].expand_as(key).contiguous()
    value, beta = torch.randn(2, 3, time, dim), torch.rand(2, 3, time)
    decay = -torch.rand(2, 3, time) * 0.2
    wanted = recurrence(*(x.double() for x in (query, key, value, decay, beta)))
    found = delta_rule(query, key, value, decay, beta).double()
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("shape", [(3, 8, 16), (1, 16, 16)])
def test_muons_update_has_singular_values_near_one(shape: tuple[int, int, int]) -> None:
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape)).float())
    assert float(values.min()) > 0.5 and float(values.max()) < 1.3


def test_a_fused_matrix_is_updated_as_its_two_halves() -> None:
    weight, gradient = torch.randn(2, 8, 12), torch.randn(2, 8, 12)
    fused = torch.nn.Parameter(weight.clone())
    halves = [torch.nn.Parameter(part.clone()) for part in weight.chunk(2, dim=1)]
    fused.grad = gradient
    for half, part in zip(halves, gradient.chunk(2, dim=1), strict=True):
        half.grad = part.clone()
    Muon([("x.gate_up_proj", fused)]).step(0.1)
    Muon([(f"x.{place}", half) for place, half in enumerate(halves)]).step(0.1)
    assert torch.allclose(fused, torch.cat(halves, dim=1), atol=2e-3)  # products in bfloat16
    assert not torch.allclose(fused, weight, atol=2e-3)


def test_the_learning_rate_rises_stays_and_falls_to_nothing() -> None:
    rates = [learning_rate(progress) for progress in np.linspace(0, 1, 101)]
    assert max(rates) == 1 and rates[-1] == 0 and 0 < rates[0] < 0.1
    assert learning_rate(WARMUP) == 1 == learning_rate(DECAY_FROM)
    assert all(a >= b for a, b in itertools.pairwise(rates[50:]))


def test_routing_figures_by_hand() -> None:
    routing = Routing.empty(layers=1, experts=4)
    ids = torch.tensor([[0, 1], [0, 2], [0, 1], [3, 1]])
    routing.add([ids], batch=1, used=1)
    assert routing.counts.tolist() == [[3, 3, 1, 1]]
    report = routing.report()
    assert report["top_quarter"] == 3 / 8
    entropy = -(2 * 3 / 8 * np.log(3 / 8) + 2 / 8 * np.log(1 / 8))
    assert report["effective_experts"] == [round(float(np.exp(entropy)), 1)]
    assert report["reuse"] == {1: round(3 / 6, 4), 8: 0.0}  # 0 again, 0 again, 1 again
    other = Routing(torch.tensor([[0.0, 0.0, 1.0, 3.0]], dtype=torch.float64))
    table = transfer({"a": other, "b": Routing(torch.tensor([[8.0, 1.0, 1.0, 2.0]], dtype=torch.float64))})
    assert table == {"a": {"a": 0.75, "b": round(2 / 12, 4)}, "b": {"a": 0.0, "b": round(8 / 12, 4)}}


def test_sequences_that_only_fill_a_batch_are_not_counted() -> None:
    routing = Routing.empty(layers=1, experts=4)
    routing.add([torch.tensor([[0], [0], [1], [1]])], batch=2, used=1)
    assert routing.counts.tolist() == [[2, 0, 0, 0]] and routing.pairs[1] == 1
