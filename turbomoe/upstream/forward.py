"""One forward pass of a stock shell over our memory, with its own layers or with a fast body between its ends."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from turbomoe.kv.cache import KVCache
from turbomoe.models.fast.base import Body
from turbomoe.upstream.attention import StepView


def _cache_argument(shell: nn.Module) -> str:
    """``past_key_values`` until transformers 5.2x, ``cache`` after."""
    parameters = inspect.signature(shell.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def forward(shell: nn.Module, ids: torch.Tensor, memory: KVCache, keep: int, body: Body | None = None) -> torch.Tensor:
    """Run ids int64 [B, S] through the open step of ``memory``; logits [B, min(keep, S) or S if keep is 0, vocab].

    ``body`` runs the decoder layers; None leaves them to the shell.
    """
    return _stock(shell, ids, memory, keep) if body is None else _fast(shell, ids, memory, keep, body)


def _stock(shell: nn.Module, ids: torch.Tensor, memory: KVCache, keep: int) -> torch.Tensor:
    """Names of arguments differ between releases; the shell sees our memory as its cache."""
    step = memory.step
    assert step is not None
    view = StepView(memory)
    arguments = {_cache_argument(shell): view, "use_cache": True, "logits_to_keep": keep}
    out = shell(input_ids=ids, position_ids=step.positions(0, step.count), **arguments)
    view.write_back()
    logits: torch.Tensor = out.logits
    return logits


def _fast(shell: Any, ids: torch.Tensor, memory: KVCache, keep: int, body: Body) -> torch.Tensor:
    """Embedding, final norm and head are the shell's; no family with a body does anything else there."""
    assert memory.step is not None
    hidden = body.run(shell.model.embed_tokens(ids), memory.step, memory)
    logits: torch.Tensor = shell.lm_head(shell.model.norm(hidden[:, -keep:]))
    return logits
