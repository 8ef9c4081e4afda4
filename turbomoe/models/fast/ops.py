"""What the bodies share: projections of one input computed as one, norms, rotary angles.

Python and dispatch are the cost at batch 1, so everything here counts calls: about 2 us each on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from turbomoe.kv.layer import Step
from turbomoe.models.packed import run_together

Op = Callable[[torch.Tensor], torch.Tensor]


def single(linear: nn.Module) -> Op:
    """One projection without the module call around it."""
    if type(linear) is nn.Linear:
        return partial(F.linear, weight=linear.weight, bias=linear.bias)
    return linear.forward  # a packed layer


class Joined:
    """Projections of one input. Float weights are merged into one matrix, packed ones go through ``run_together``.

    Merging re-points the layers' parameters to views of the merged matrix: the shell stays whole, nothing is doubled.
    """

    def __init__(self, linears: Sequence[nn.Module]) -> None:
        self._linears = list(linears)
        self._sizes = [int(linear.out_features) for linear in linears]  # type: ignore[arg-type]
        plain = [linear for linear in linears if type(linear) is nn.Linear]
        self._merged = _merge(plain) if len(plain) == len(linears) else None

    def side_by_side(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, in] -> all outputs in one tensor [N, sum of out]."""
        if self._merged is not None:
            return F.linear(x, *self._merged)
        return torch.cat(run_together(self._linears, x), -1)

    def apart(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """x [N, in] -> one tensor [N, out] for each projection."""
        if self._merged is not None:
            return F.linear(x, *self._merged).split_with_sizes(self._sizes, -1)
        return run_together(self._linears, x)


def _merge(linears: Sequence[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor | None]:
    return _stack(linears, "weight"), _stack(linears, "bias") if any(x.bias is not None for x in linears) else None


def _stack(linears: Sequence[nn.Linear], leaf: str) -> torch.Tensor:
    parts = [getattr(linear, leaf) for linear in linears]
    # A missing bias among others is one of zeros.
    parts = [
        x.weight.new_zeros(x.out_features) if part is None else part for x, part in zip(linears, parts, strict=True)
    ]
    merged = torch.cat([part.detach() for part in parts])
    for linear, part, view in zip(linears, parts, merged.split([len(part) for part in parts]), strict=True):
        if getattr(linear, leaf) is part:
            setattr(linear, leaf, nn.Parameter(view, requires_grad=False))
    return merged


class RMSNorm:
    """Root-mean-square norm over the last axis in float32, times ``weight`` (which may have more axes than one).

    Zhang & Sennrich 2019. On a CPU ``F.rms_norm`` is a composite of ten calls; this is five.
    """

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self.weight, self._inverse = weight.detach(), 1.0 / weight.shape[-1]
        self._eps = torch.tensor([eps], dtype=torch.float32, device=weight.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., n] -> the same shape and dtype, fresh."""
        y = x.float()
        norm = torch.linalg.vector_norm(y, 2, -1, True)
        scale = torch.addcmul(self._eps, norm, norm, value=self._inverse).rsqrt_()
        return (y * scale).mul_(self.weight).to(x.dtype)


class Rotary:
    """Rotary angles from the shell's own frequencies (Su et al. 2021), split halves, the first ``2 * len`` channels."""

    def __init__(self, rotary: Any) -> None:
        self._frequencies: torch.Tensor = rotary.inv_freq.float()
        self._scaling = float(rotary.attention_scaling)
        self.channels = 2 * len(self._frequencies)

    def angles(self, step: Step, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, signed sin) of the step's tokens, [B * S, 1, rotated] each; for ``rotate``."""
        positions = step.positions(0, step.count).reshape(-1, 1, 1)
        turns = positions.float() * self._frequencies
        cos, sin = turns.cos(), turns.sin()
        if self._scaling != 1.0:
            cos, sin = cos * self._scaling, sin * self._scaling
        return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def rotate(x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate the leading channels of x [N, heads, head_dim], which is overwritten where not all of them turn."""
    cos, sin = angles
    size = cos.shape[-1]
    whole = size == x.shape[-1]
    part = x if whole else x[..., :size]
    turned = torch.addcmul(part * cos, part.roll(size // 2, -1), sin)
    if whole:
        return turned
    part.copy_(turned)
    return x
