"""One forward pass of a stock model over our memory, whatever the release calls its arguments."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from turbomoe.kv.cache import KVCache
from turbomoe.upstream.attention import StepView


def _cache_argument(shell: nn.Module) -> str:
    """``past_key_values`` until transformers 5.2x, ``cache`` after."""
    parameters = inspect.signature(shell.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def forward(shell: nn.Module, ids: torch.Tensor, memory: KVCache, keep: int) -> torch.Tensor:
    """Run ids int64 [B, S] through the open step of ``memory``; logits [B, min(keep, S) or S if keep is 0, vocab]."""
    step = memory.step
    assert step is not None
    view = StepView(memory)
    arguments = {_cache_argument(shell): view, "use_cache": True, "logits_to_keep": keep}
    out = shell(input_ids=ids, position_ids=step.positions(0, step.count), **arguments)
    view.write_back()
    logits: torch.Tensor = out.logits
    return logits
