"""A kernel is used once it has agreed with its reference, kind by kind."""

from __future__ import annotations

import pytest
import torch

from turbomoe.kv.kernels.checked import Checked
from turbomoe.notices import board


def double(x: torch.Tensor, kind: str) -> torch.Tensor:
    return 2 * x


def wrong(x: torch.Tensor, kind: str) -> torch.Tensor:
    calls.append(kind)
    return {"right": 2.001 * x, "wrong": 2.1 * x, "nan": x * float("nan")}[kind]


calls: list[str] = []


def kind_of(x: torch.Tensor, kind: str) -> str:
    return kind


def test_a_kernel_that_agrees_is_used_from_the_second_call_on() -> None:
    calls.clear()
    checked, x = Checked("sums", wrong, double, kind_of), torch.randn(9)
    assert torch.equal(checked(x, "right"), 2 * x)
    assert torch.equal(checked(x, "right"), 2.001 * x)
    assert calls == ["right", "right"]


@pytest.mark.parametrize(
    ("kind", "why"), [("wrong", "differs from its reference by 5.0%"), ("nan", "not finite"), ("other", "failed")]
)
def test_one_that_errs_is_not_used_again_and_says_so(kind: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    calls.clear()
    checked, x = Checked(f"sums {kind}", wrong, double, kind_of), torch.randn(9)
    for _ in range(3):
        assert torch.equal(checked(x, kind), 2 * x)
    assert calls == [kind] and why in capsys.readouterr().err
    assert board.counts[f"the GPU kernel for sums {kind} is not used"] == 1
    checked(x, "right")
    assert torch.equal(checked(x, "right"), 2.001 * x), "another kind has its own verdict"
