"""The GPU's search: its fixed-point reference against that of floats, and the kernel against it in the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from turbomoe.kv import trellis_pairs
from turbomoe.kv.codecs.scales import spread_out
from turbomoe.kv.trellis_codebook import TRELLISES, Trellis, codebook
from turbomoe.kv.trellis_fixed import START, UNREACHABLE, _forward, fixed, search_fixed, to_fixed
from turbomoe.kv.trellis_search import search

IN_32_BITS = [name for name, trellis in TRELLISES.items() if not trellis_pairs.fits(trellis)]
SCRIPT = Path(__file__).with_name("encode_kernel.py")


def errors(x: torch.Tensor, windows: torch.Tensor, name: str) -> torch.Tensor:
    values = codebook(TRELLISES[name]).t()[windows].flatten(1)
    return (values.double() - x).square().sum(-1)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("name", TRELLISES)
def test_paths_in_fixed_point_are_as_good(name: str, dim: int) -> None:
    """Measured on 3,000 vectors: at most 0.1% more (tcq2). The samples' own difference is a tenth of a percent."""
    x = spread_out(torch.randn(400, dim))[0]
    plain, ours = search(x, TRELLISES[name]), search_fixed(x, TRELLISES[name])
    trellis = TRELLISES[name]
    assert torch.equal(ours & trellis.groups - 1, ours.roll(1, 1) >> trellis.step_bits)
    assert float(errors(x, ours, name).sum()) <= 1.003 * float(errors(x, plain, name).sum())


@pytest.mark.parametrize("name", IN_32_BITS)
def test_the_lowest_bits_of_a_cost_stay_free(name: str) -> None:
    parts = fixed(TRELLISES[name])
    low = (1 << TRELLISES[name].step_bits) - 1
    assert all(number & low == 0 for row in (*parts.slopes, parts.offsets) for number in row)


@pytest.mark.parametrize("name", IN_32_BITS)
def test_costs_stay_in_range(name: str) -> None:
    """Vectors with all of their norm in one place, or in the steps that reach every state."""
    trellis = TRELLISES[name]
    x = torch.zeros(12, 256)
    for row, (at, many) in enumerate((a, m) for a in (0, 37, 250) for m in (1, 2, 5, 6)):
        x[row, at : at + many] = 16 / many**0.5
    steps = to_fixed(torch.cat((x, -x)), trellis).int().unflatten(-1, (-1, trellis.values))
    start = torch.full((len(steps), trellis.groups), UNREACHABLE, dtype=torch.int32)
    start[:, trellis.groups // 3] = START
    every = torch.stack(_forward(steps, start, trellis)[1])
    wide = torch.stack(_forward(steps.long(), start.long(), trellis)[1])
    assert torch.equal(every.long(), wide)
    assert int(every.min()) > 0
    assert int(every[-1].max()) < UNREACHABLE


def test_16_bits_serve_tcq2_alone() -> None:
    assert IN_32_BITS == ["tcq2.5", "tcq3", "tcq4"]


def wide_forward(x: torch.Tensor, costs: torch.Tensor, trellis: Trellis) -> tuple[torch.Tensor, torch.Tensor]:
    """``trellis_pairs.forward`` in 64 bits and with the least cost left in: costs, and dropped bits [steps, n, groups].

    From the definition of a distance: (x - v)^2 in 1/64, from 16 on in 1/32 that count as one, to even on ties.
    """
    dropped = []
    for step in x.unbind(1):
        square = (step.double()[:, None] - codebook(trellis).double()).square()
        distance = torch.where(square < 16, (square * 64).round(), 1024 + ((square - 16) * 32).round())
        total = costs.repeat(1, 4) + distance.long()
        costs, bits = total.unflatten(1, (trellis.groups, 4)).min(-1)
        dropped.append(bits)
    return costs, torch.stack(dropped)


def hard_vectors() -> torch.Tensor:
    """[n, 256], of unit variance or clipped: the norm in one place, in sixteen, +-4 in turn or all along, and drawn."""
    x = torch.zeros(20, 256)
    for row, at in enumerate((0, 1, 37, 250)):
        x[row, at] = 16
        x[4 + row, at : at + 16] = 4
        x[8 + row, at::16] = 4
    x[12], x[13] = 4, torch.tensor((4.0, -4.0)).repeat(128)
    x[14], x[15] = torch.tensor((4.0, 4.0, -4.0, -4.0)).repeat(64), torch.tensor((4.0, 0.0)).repeat(128)
    x[16:] = torch.randint(0, 2, (4, 256)) * 8.0 - 4
    return torch.cat((x, -x, torch.randn(20, 256) * 3))


@pytest.mark.parametrize("somewhere", [True, False])
def test_costs_of_16_bits_stay_in_range(somewhere: bool) -> None:
    """The paths of the wide costs, from anywhere and from each of a few groups; room is left, but not twice as much."""
    trellis = TRELLISES["tcq2"]
    x = trellis_pairs.to_halves(hard_vectors())
    start = torch.zeros(len(x), trellis.groups, dtype=torch.int32)
    if not somewhere:
        start += trellis_pairs.UNREACHABLE
        start[torch.arange(len(x)), torch.arange(len(x)) * 37 % trellis.groups] = 0
    costs, every = trellis_pairs.forward(x, start, trellis)
    # Without a path is farther than any path is long.
    wide_start = (start // trellis_pairs.UNREACHABLE).long() << 40
    wide, dropped = wide_forward(x, wide_start, trellis)
    reached = 0 if somewhere else 4
    assert torch.equal(torch.stack(every)[reached:] & 3, dropped[reached:])
    assert torch.equal(costs.long(), (wide - wide.amin(1, keepdim=True)) * 4)


def test_distances_leave_room_for_eight_steps() -> None:
    x = torch.arange(-512, 513).mul(trellis_pairs.UNIT).half()
    distances = trellis_pairs.distances(x, TRELLISES["tcq2"])
    assert int(distances.min()) == 0
    assert not (distances & 3).any()
    largest = int(distances.max())
    assert trellis_pairs.RENEWED * largest + 3 < 1 << 16
    assert 4 * largest + 3 < trellis_pairs.UNREACHABLE < (1 << 16) - 4 * largest - 3


def test_the_kernel_finds_the_same_in_the_interpreter() -> None:
    """Small trellises: the interpreter takes a millisecond for an addition."""
    root = Path(__file__).parents[2]
    env = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run([sys.executable, str(SCRIPT)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("equal") == 4
