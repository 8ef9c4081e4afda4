"""Routed experts for training: tokens sorted by expert, one grouped product for all, and only gathers both ways.

The plan of a step (``Dispatch``) gives every (token, choice) a row in a buffer where each expert owns one run of rows.
Runs are padded to a multiple of ``align`` rows, so sizes are the same in every step and nothing waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Dispatch:
    """``rows`` [tokens * active]: buffer row of each choice. ``slots`` [buffer rows]: the choice in each row, or
    tokens * active where the row is padding. ``ends`` [experts] int32: end of each expert's run. ``counts``: choices
    of each expert. ``active``: choices a token.
    """

    rows: Tensor
    slots: Tensor
    ends: Tensor
    counts: Tensor
    active: int


def dispatch(ids: Tensor, experts: int, align: int) -> Dispatch:
    """The plan for expert ids [tokens, active]."""
    flat = ids.flatten()
    choices = flat.numel()
    order = flat.argsort(stable=True)
    ends = torch.searchsorted(flat[order], torch.arange(experts, device=ids.device), right=True)
    counts = ends.diff(prepend=ends.new_zeros(1))
    padded = (counts + align - 1) // align * align
    starts = padded.cumsum(0) - padded
    sorted_ids = flat[order]
    place = torch.arange(choices, device=ids.device) - (ends - counts)[sorted_ids] + starts[sorted_ids]
    size = (choices + align - 1) // align * align + experts * align
    rows = torch.empty_like(place).scatter_(0, order, place)
    slots = torch.full((size,), choices, device=ids.device, dtype=torch.long).scatter_(0, place, order)
    run_ends = padded.cumsum(0)
    # The last run takes the rest of the buffer: rows outside all runs would be left unwritten.
    last = torch.arange(experts, device=ids.device) == experts - 1
    run_ends = torch.where(last, size, run_ends).to(torch.int32)
    return Dispatch(rows, slots, run_ends, counts, ids.shape[1])


class Spread(torch.autograd.Function):
    """Token rows [tokens, n] -> buffer [rows, n]; padding rows are zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, slots: Tensor, active: int) -> Tensor:
        """Gather by the choice in each row."""
        ctx.save_for_backward(rows)
        ctx.active = active
        return _with_zero_row(x)[slots // active]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Each token gathers its own rows."""
        (rows,) = ctx.saved_tensors
        return grads[0][rows].unflatten(0, (-1, ctx.active)).sum(1), None, None, None


class Collect(torch.autograd.Function):
    """Buffer [rows, n] -> choices [tokens * active, n]."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
        """Gather by the row of each choice."""
        ctx.save_for_backward(slots)
        return y[rows]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Each row gathers its choice; padding gets zero."""
        (slots,) = ctx.saved_tensors
        return _with_zero_row(grads[0])[slots], None, None


def _with_zero_row(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])


@dataclass(frozen=True)
class Product:
    """A way to multiply runs of rows with their expert's matrix, and the run length that it needs."""

    name: str
    align: int
    multiply: Callable[[Tensor, Tensor, Tensor], Tensor]


def _grouped(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(rows, weight.mT, offs=ends)


def _blocked(block: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def multiply(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        starts = torch.arange(0, rows.shape[0], block, device=rows.device)
        owner = torch.searchsorted(ends, starts, right=True)
        return torch.bmm(rows.view(-1, block, rows.shape[-1]), weight[owner].mT).flatten(0, 1)

    return multiply


GROUPED = Product("grouped", 8, _grouped)
"""PyTorch's grouped matrix product; bfloat16 on a GPU of Hopper's generation or later."""


def blocked(block: int) -> Product:
    """Blocks of ``block`` rows, each with a gathered copy of its expert's matrix: any device, any type, slower."""
    return Product(f"blocked{block}", block, _blocked(block))


class Experts(nn.Module):
    """SwiGLU experts stacked as transformers stacks them: gate and up [experts, 2 * width, hidden], down
    [experts, hidden, width].
    """

    def __init__(self, experts: int, hidden: int, width: int, product: Product) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.product = product

    def forward(self, x: Tensor, shares: Tensor, plan: Dispatch, weights: tuple[Tensor, Tensor]) -> Tensor:
        """x [tokens, hidden], shares [tokens, active] -> [tokens, hidden], the sum over each token's experts."""
        gate_up, down = weights
        rows: Tensor = Spread.apply(x.to(gate_up.dtype), plan.rows, plan.slots, plan.active)  # type: ignore[no-untyped-call]
        gate, up = self.product.multiply(rows, gate_up, plan.ends).chunk(2, dim=-1)
        out = self.product.multiply(F.silu(gate) * up, down, plan.ends)
        choices: Tensor = Collect.apply(out, plan.rows, plan.slots)  # type: ignore[no-untyped-call]
        chosen = choices.unflatten(0, (-1, plan.active))
        total: Tensor = (chosen.float() * shares.unsqueeze(-1)).sum(1)
        return total


def balance_loss(probabilities: Tensor, plan: Dispatch) -> Tensor:
    """Experts * sum(share of choices * mean probability) over the whole batch; 1 when both are uniform.

    Taken over many sequences at once, it asks for balance in the mix of texts, not within each text (Qiu et al. 2025).
    """
    share = plan.counts.float() / plan.counts.sum()
    return probabilities.shape[-1] * (share * probabilities.mean(0)).sum()
