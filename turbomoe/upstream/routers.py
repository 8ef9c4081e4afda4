"""The gates of a stock model: the matrices that score experts."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

NAMES = ("gate", "router")  # what transformers' families call the router beside a layer's experts


def gate_weights(shell: nn.Module, experts: Collection[nn.Module]) -> list[torch.Tensor | None]:
    """The gate weight [experts, hidden] beside each of ``experts`` (modules of ``shell``), None where there is none.

    A view of the model's own memory. Biases and corrections that some families add are not part of it.
    """
    names = {module: name for name, module in shell.named_modules()}
    return [_gate(shell.get_submodule(names[module].rpartition(".")[0])) for module in experts]


def _gate(block: nn.Module) -> torch.Tensor | None:
    for name in NAMES:
        weight = getattr(getattr(block, name, None), "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() == 2:
            return weight.detach()
    return None
