"""The C core's arithmetic in plain PyTorch: what its tests compare with, and what runs where no core is there.

``quantised=True`` rounds activations to int8 exactly as the core does; without it they stay float32, which is
more exact than the core and no slower here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from turbomoe.native.layout import GROUP
from turbomoe.native.packed import PackedExperts, PackedMatrix
from turbomoe.native.repack import unpack


def round_activations(x: torch.Tensor) -> torch.Tensor:
    """float32 [..., cols] rounded to int8 times a float32 scale per 32 values; cols a multiple of 32.

    Ties go to even. A group with an infinity or a NaN becomes NaN as a whole, one of zeros stays zero.
    """
    groups = x.float().unflatten(-1, (-1, GROUP))
    most = groups.abs().amax(dim=-1, keepdim=True)
    usable = (most > 2.0**-100) & (most < 2.0**120)
    # Tensor by tensor: 127.0 / most would be 127 times a rounded reciprocal.
    inverse = torch.where(usable, torch.full_like(most, 127.0) / most, torch.zeros_like(most))
    codes = torch.where(usable, (groups * inverse).round(), torch.zeros_like(groups))
    scale = torch.where(most < 2.0**120, most / 127.0, torch.full_like(most, float("nan")))
    return (codes * scale).flatten(-2)


def clipped_swiglu(gate: torch.Tensor, up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """The activation of gpt-oss: both clipped, the gate from above only, and up moved by one."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def gate_function(experts: PackedExperts) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The layer's activation as a function of gate and up."""
    if experts.shape.activation == "silu":
        return lambda gate, up: F.silu(gate) * up
    if experts.shape.activation == "gelu_tanh":
        return lambda gate, up: F.gelu(gate, approximate="tanh") * up
    return lambda gate, up: clipped_swiglu(gate, up, experts.shape.alpha, experts.shape.limit)


def linear(matrix: PackedMatrix, x: torch.Tensor, *, quantised: bool = False) -> torch.Tensor:
    """x [tokens, cols] times a packed matrix: float32 [tokens, rows]."""
    layout = matrix.layout
    weight = unpack(matrix.blob, layout.format.name, layout.rows, layout.cols)
    x = round_activations(x) if quantised and not layout.format.is_float else x.float()
    return F.linear(x, weight, matrix.bias)


def expert(experts: PackedExperts, index: int, x: torch.Tensor, *, quantised: bool = False) -> torch.Tensor:
    """One expert on rows [n, hidden]: float32 [n, hidden]."""
    parts = experts.matrices(index)
    h = gate_function(experts)(*(linear(parts[n], x, quantised=quantised) for n in ("gate", "up")))
    return linear(parts["down"], h, quantised=quantised)


def run_experts(
    experts: PackedExperts, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *, quantised: bool = False
) -> torch.Tensor:
    """sum over k, in order, of weights[:, k] * expert ids[:, k](hidden): float32 [rows, hidden].

    Negative ids are left out of the sum.
    """
    terms = torch.zeros(*ids.shape, experts.shape.hidden)
    for index in ids[ids >= 0].unique().tolist():
        rows, places = (ids == index).nonzero(as_tuple=True)
        terms[rows, places] = expert(experts, index, hidden[rows].float(), quantised=quantised)
    out = torch.zeros(len(ids), experts.shape.hidden)
    for k in range(ids.shape[1]):
        out += weights[:, k : k + 1].float() * terms[:, k]
    return out
