"""The search's assembly on a CPU: a step and a renewal of all four trellises, against the exact reference."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.kv import ptx
from turbomoe.kv.kernels import encode_assembly
from turbomoe.kv.trellis_codebook import TRELLISES, Trellis
from turbomoe.kv.trellis_fixed import fixed, forward, to_halves

PAIRS = 300


def joined(x: torch.Tensor) -> npt.NDArray[np.uint32]:
    """Costs [2 * PAIRS] of pairs of vectors as words."""
    pairs = x.view(PAIRS, 2).numpy().astype(np.uint32)
    return pairs[:, 0] | pairs[:, 1] << np.uint32(16)


def parted(words: npt.NDArray[np.uint32]) -> torch.Tensor:
    halves = np.stack((words & 0xFFFF, words >> 16), 1).reshape(-1)
    return torch.from_numpy(halves.astype(np.int32))


def drawn(trellis: Trellis) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of a step, float16 [n, 1, values], some at the clip, and costs int32 [n, groups], low bits free."""
    x = torch.randn(2 * PAIRS, trellis.values) * 1.5
    x[:8] = torch.tensor((4.0, -4.0, 0.0, 9.0))[:, None].repeat(2, trellis.values)
    costs = torch.randint(0, 1 << 15 - trellis.step_bits, (2 * PAIRS, trellis.groups), dtype=torch.int32)
    return to_halves(x, trellis)[:, None], costs << trellis.step_bits


@pytest.mark.parametrize("name", TRELLISES)
def test_a_step_equals_the_reference(name: str) -> None:
    """Its costs, with the groups' own bits, and the bits that were dropped, where the kernel looks for them."""
    trellis = TRELLISES[name]
    many, kept = 1 << trellis.step_bits, encode_assembly.kept(trellis)
    x, costs = drawn(trellis)
    _, (every,) = forward(x, costs, trellis)
    own = torch.arange(trellis.groups, dtype=torch.int32) % many
    shorts = x.view(torch.int16).int()[:, 0] & 0xFFFF
    inputs = [joined(column) for column in (*(costs | own).t(), *shorts.t())]
    found = ptx.run_storing(encode_assembly.step(trellis), inputs)
    for group in range(trellis.groups):
        word, at = divmod(kept.place(group), kept.each)
        noted = found[f"[${2 * trellis.groups + trellis.values}+{4 * encode_assembly.THREADS * word}]"]
        assert torch.equal(parted(noted) >> at * trellis.step_bits & many - 1, every[:, group] % many)
        assert torch.equal(parted(found[f"${group}"]), every[:, group] & -many | own[group])


@pytest.mark.parametrize("name", TRELLISES)
def test_a_renewal_takes_the_least_from_all(name: str) -> None:
    trellis = TRELLISES[name]
    costs = drawn(trellis)[1] + 5 * (1 << trellis.step_bits)
    own = torch.arange(trellis.groups, dtype=torch.int32) % (1 << trellis.step_bits)
    found = ptx.run(encode_assembly.renew(trellis), [joined(column) for column in (costs | own).t()])
    expected = costs - costs.amin(1, keepdim=True) | own
    assert torch.equal(torch.stack([parted(each) for each in found], 1), expected)


@pytest.mark.parametrize("name", TRELLISES)
def test_a_limit_holds_costs_at_that_of_no_path(name: str) -> None:
    trellis = TRELLISES[name]
    most, costs = fixed(trellis).unreachable, drawn(trellis)[1]
    costs[:4] = torch.tensor((0, most, most - (1 << trellis.step_bits), most + (1 << trellis.step_bits)))[:, None]
    own = torch.arange(trellis.groups, dtype=torch.int32) % (1 << trellis.step_bits)
    found = ptx.run(encode_assembly.limit(trellis), [joined(column) for column in (costs | own).t()])
    assert (costs > most).any() and (costs < most).any()
    assert torch.equal(torch.stack([parted(each) for each in found], 1), costs.clamp(max=most) | own)


@pytest.mark.parametrize("name", TRELLISES)
def test_every_group_has_a_place_of_its_own(name: str) -> None:
    kept = encode_assembly.kept(TRELLISES[name])
    places = [kept.place(group) for group in range(kept.groups)]
    assert sorted(places) == list(range(kept.groups))
    assert kept.each * kept.step_bits <= 16
