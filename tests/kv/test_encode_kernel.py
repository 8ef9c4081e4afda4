"""The GPU's search: its 16-bit reference against that of floats, and the kernel against it in the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from turbomoe.kv.codecs.scales import spread_out
from turbomoe.kv.trellis_codebook import TRELLISES, Trellis, codebook
from turbomoe.kv.trellis_fixed import LARGEST, UNREACHABLE, distances, fixed, forward, search_fixed, to_halves
from turbomoe.kv.trellis_search import search

SCRIPT = Path(__file__).with_name("encode_kernel.py")


def errors(x: torch.Tensor, windows: torch.Tensor, name: str) -> torch.Tensor:
    values = codebook(TRELLISES[name]).t()[windows].flatten(1)
    return (values.double() - x).square().sum(-1)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("name", TRELLISES)
def test_paths_in_16_bits_are_as_good(name: str, dim: int) -> None:
    """Measured on 3,000 vectors: at most 0.07% more (tcq4). The samples' own difference is a tenth of a percent."""
    trellis = TRELLISES[name]
    x = spread_out(torch.randn(400, dim))[0]
    plain, ours = search(x, trellis), search_fixed(x, trellis)
    assert torch.equal(ours & trellis.groups - 1, ours.roll(1, 1) >> trellis.step_bits)
    assert float(errors(x, ours, name).sum()) <= 1.003 * float(errors(x, plain, name).sum())


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


@pytest.mark.parametrize("name", TRELLISES)
def test_hard_vectors_have_valid_codes_and_errors_like_those_of_floats(name: str) -> None:
    trellis, x = TRELLISES[name], torch.cat((hard_vectors(), torch.zeros(1, 256)))
    plain, ours = search(x, trellis), search_fixed(x, trellis)
    assert torch.equal(ours & trellis.groups - 1, ours.roll(1, 1) >> trellis.step_bits)
    ratio = errors(x, ours, name) / errors(x, plain, name)
    print(name, ratio.max(), ratio.argmax(), ratio.sort().values[-12:])


def wide_forward(x: torch.Tensor, costs: torch.Tensor, trellis: Trellis) -> tuple[torch.Tensor, torch.Tensor]:
    """``forward`` in 64 bits and with the least cost left in: costs, and dropped bits [steps, n, groups].

    From the definition of a distance: (x - v)^2 in 2^-11, at most ``most``; on ties that which makes a pattern of bits
    even.
    """
    parts, dropped = fixed(trellis), []
    v = (codebook(trellis).double() * parts.scale * 512).round() / 512
    for step in x.unbind(1):
        square = (step.double()[:, :, None] - v).square() * 2048
        distance = ((square.clamp(max=parts.most) + parts.base).round() - parts.base).sum(1).long()
        total = costs.repeat(1, 1 << trellis.step_bits) + distance
        costs, bits = total.unflatten(1, (trellis.groups, -1)).min(-1)
        dropped.append(bits)
    return costs, torch.stack(dropped)


@pytest.mark.parametrize("somewhere", [True, False])
@pytest.mark.parametrize("name", TRELLISES)
def test_costs_stay_in_range(name: str, somewhere: bool) -> None:
    """The paths of the wide costs, from anywhere and from each of a few groups."""
    trellis = TRELLISES[name]
    x = to_halves(hard_vectors(), trellis).unflatten(-1, (-1, trellis.values))
    start = torch.zeros(len(x), trellis.groups, dtype=torch.int32)
    if not somewhere:
        start += UNREACHABLE
        start[torch.arange(len(x)), torch.arange(len(x)) * 37 % trellis.groups] = 0
    costs, every = forward(x, start, trellis)
    # Without a path is farther than any path is long.
    wide_start = (start // UNREACHABLE).long() << 40
    wide, dropped = wide_forward(x, wide_start, trellis)
    reached = 0 if somewhere else fixed(trellis).steps_to_all
    many = 1 << trellis.step_bits
    assert torch.equal(torch.stack(every)[reached:] % many, dropped[reached:])
    assert torch.equal(costs.long(), (wide - wide.amin(1, keepdim=True)) * many)


@pytest.mark.parametrize("name", TRELLISES)
def test_distances_leave_room_for_the_steps_between_renewals(name: str) -> None:
    trellis = TRELLISES[name]
    parts, many = fixed(trellis), 1 << trellis.step_bits
    x = to_halves(torch.arange(-600, 601).div(128)[:, None].repeat(1, trellis.values), trellis)
    found = distances(x, trellis)
    assert not (found % many).any()
    assert int(found.min()) >= 0
    largest = int(found.max())
    assert largest == trellis.values * parts.most * many
    assert parts.renewed >= 2 * parts.steps_to_all - 1
    assert parts.renewed * largest + many - 1 < 1 << 16
    assert parts.steps_to_all * largest < UNREACHABLE < (1 << 16) - parts.steps_to_all * largest - many + 1
    assert 64 % parts.renewed == 0


@pytest.mark.parametrize("name", TRELLISES)
def test_every_x_has_values_that_do_not_saturate(name: str) -> None:
    """Each group's own, so that the least of a minimum says something: from a state some next one is near."""
    trellis = TRELLISES[name]
    reach = (fixed(trellis).most / 2048) ** 0.5 / fixed(trellis).scale
    for row in codebook(trellis):
        assert LARGEST - float(row.max()) < reach
        assert LARGEST + float(row.min()) < reach


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
