"""The GPU's search: its fixed-point reference against that of floats, and the kernel against it in the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from turbomoe.kv.codecs.scales import spread_out
from turbomoe.kv.trellis_codebook import TRELLISES, codebook
from turbomoe.kv.trellis_fixed import START, UNREACHABLE, _forward, fixed, search_fixed, to_fixed
from turbomoe.kv.trellis_search import search

SCRIPT = Path(__file__).with_name("encode_kernel.py")


def errors(x: torch.Tensor, windows: torch.Tensor, name: str) -> torch.Tensor:
    values = codebook(TRELLISES[name]).t()[windows].flatten(1)
    return (values.double() - x).square().sum(-1)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("name", TRELLISES)
def test_paths_in_fixed_point_are_as_good(name: str, dim: int) -> None:
    """Measured on 3,000 vectors: at most 0.06% more (tcq4). The samples' own difference is a tenth of a percent."""
    x = spread_out(torch.randn(400, dim))[0]
    plain, ours = search(x, TRELLISES[name]), search_fixed(x, TRELLISES[name])
    trellis = TRELLISES[name]
    assert torch.equal(ours & trellis.groups - 1, ours.roll(1, 1) >> trellis.step_bits)
    assert float(errors(x, ours, name).sum()) <= 1.003 * float(errors(x, plain, name).sum())


@pytest.mark.parametrize("name", TRELLISES)
def test_the_lowest_bits_of_a_cost_stay_free(name: str) -> None:
    parts = fixed(TRELLISES[name])
    low = (1 << TRELLISES[name].step_bits) - 1
    assert all(number & low == 0 for row in (*parts.slopes, parts.offsets) for number in row)


@pytest.mark.parametrize("name", TRELLISES)
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


def test_the_kernel_finds_the_same_in_the_interpreter() -> None:
    """Small trellises: the interpreter takes a millisecond for an addition."""
    root = Path(__file__).parents[2]
    env = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run([sys.executable, str(SCRIPT)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("equal") == 3
