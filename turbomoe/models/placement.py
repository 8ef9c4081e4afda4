"""Where a tensor of a model file goes: into one parameter, into the expert store, or nowhere; and the transforms.

llama.cpp's converter rearranges some tensors for its own kernels. The transforms here undo that; the layouts
are facts of the GGUF files. Each takes a float tensor and works on the meta device too, which is how shapes
are checked before a byte is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Transform = Callable[[torch.Tensor], torch.Tensor]


def same(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as it is."""
    return tensor


@dataclass(frozen=True)
class Dense:
    """One parameter (or buffer) of the shell: ``transform(file tensor)``, computed in float32 unless it is ``same``.

    In a family's table ``name`` is relative to the decoder layer; in a name map it is the whole name.
    """

    name: str
    transform: Transform = same


@dataclass(frozen=True)
class Routed:
    """Weights of routed experts. The rows of an expert are shared evenly by ``parts``, in this order.

    ``expert`` None: the tensor stacks all experts on its first axis. ``layer`` -1 in a family's table.
    """

    parts: tuple[str, ...]
    layer: int = -1
    expert: int | None = None


@dataclass(frozen=True)
class Skipped:
    """A tensor that a text model does not use; ``reason`` is what people read."""

    reason: str


Placement = Dense | Routed | Skipped


def minus_one(tensor: torch.Tensor) -> torch.Tensor:
    """Norm weights stored as 1 + w."""
    return tensor - 1.0


def log_negated(tensor: torch.Tensor) -> torch.Tensor:
    """A decay stored as -exp(w)."""
    return torch.log(-tensor)


def rope_pairs(heads: int) -> Transform:
    """Rows of a query or key projection from interleaved rotary pairs (2i, 2i+1) to split halves (i, i + d/2)."""

    def transform(tensor: torch.Tensor) -> torch.Tensor:
        paired = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
        return paired.transpose(1, 2).reshape(tensor.shape)

    return transform


def value_heads(key_heads: int, per_key: int, head_dim: int, *, offset: int = 0, axis: int = 0) -> Transform:
    """Value heads from tiled order (v0k0 v0k1 v1k0 v1k1) to grouped by key head (v0k0 v1k0 v0k1 v1k1).

    Only indices from ``offset`` on along ``axis`` move; each head spans ``head_dim`` of them.
    """

    def transform(tensor: torch.Tensor) -> torch.Tensor:
        size = tensor.shape[axis] - offset
        fixed, moved = tensor.split([offset, size], dim=axis)
        tiled = moved.unflatten(axis, (per_key, key_heads, head_dim))
        grouped = tiled.transpose(axis, axis + 1).flatten(axis, axis + 2)
        return torch.cat([fixed, grouped], dim=axis)

    return transform


def new_axis(axis: int) -> Transform:
    """Insert an axis of one element that the file leaves out."""
    return lambda tensor: tensor.unsqueeze(axis)


def as_row(tensor: torch.Tensor) -> torch.Tensor:
    """A vector (or a matrix of one row) as a matrix of one row."""
    return tensor.reshape(1, -1)


def chain(*steps: Transform) -> Transform:
    """Apply ``steps`` from left to right."""

    def transform(tensor: torch.Tensor) -> torch.Tensor:
        for step in steps:
            tensor = step(tensor)
        return tensor

    return transform
