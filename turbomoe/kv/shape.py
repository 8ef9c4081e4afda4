"""What a model needs remembered, layer by layer: the input from which caches are built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class AttentionShape:
    """A full-attention or sliding-window layer. ``window`` counts visible tokens, itself included; 0 means all."""

    layer: int
    query_heads: int
    kv_heads: int
    head_dim: int
    window: int = 0
    kind: Literal["attention"] = "attention"


@dataclass(frozen=True)
class RecurrentShape:
    """A linear-attention layer (Gated DeltaNet): state of one sequence, without a length axis.

    ``conv`` is (channels, kernel); ``state`` is (value heads, key dim, value dim).
    """

    layer: int
    conv: tuple[int, int]
    state: tuple[int, int, int]
    kind: Literal["recurrent"] = "recurrent"


LayerShape = AttentionShape | RecurrentShape
