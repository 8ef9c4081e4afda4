"""How fast a stock model turns its keys: read from its own rotary module, so that every kind of scaling is in it."""

from __future__ import annotations

from typing import Any

import torch

LENGTH_DEPENDENT = ("dynamic", "longrope")


def rotary_frequencies(shell: Any) -> torch.Tensor | None:
    """Radians a token of the channel pairs (i, i + r) of full-attention layers, [r]; empty for a model without any.

    None where they depend on the length of the context: the same key is then turned by different angles.
    """
    rotary = getattr(getattr(shell, "model", None), "rotary_emb", None)
    if rotary is None:
        return torch.zeros(0)
    kind = getattr(rotary, "rope_type", None)
    if isinstance(kind, dict):  # by layer type (Gemma 3)
        kind = kind.get("full_attention")
    found = getattr(rotary, "full_attention_inv_freq", getattr(rotary, "inv_freq", None))
    return None if kind in LENGTH_DEPENDENT or not isinstance(found, torch.Tensor) else found
