"""The contract of a KV codec: vectors of one head in, packed planes out, and back.

A codec sees what the layer (``layer.py``) hands it: for ``rotated`` codecs a centred, randomly
rotated vector whose coordinates are close to Gaussian; for the others the vector itself. It never sees
positions, heads or pages, so its result depends on the vector alone and not on how tokens were chunked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Plane:
    """One array of a codec's storage: ``width`` elements of ``dtype`` for each head vector."""

    name: str
    dtype: torch.dtype
    width: int

    @property
    def nbytes(self) -> int:
        return self.width * self.dtype.itemsize


class Codec(ABC):
    """One way to store a head vector of ``head_dim`` values. Stateless; all tensors on the caller's device."""

    name: str
    rotated: bool  # wants centred vectors in the rotated domain, and decodes into it
    version: int = 1  # part of every saved cache: raised when the same name comes to mean other bytes
    stride: int = 1  # values of one coordinate group in ``read``: see there

    def __init__(self, head_dim: int) -> None:
        self.head_dim = head_dim

    @property
    @abstractmethod
    def planes(self) -> tuple[Plane, ...]:
        """The planes of one vector, in storage order."""

    @abstractmethod
    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Encode float vectors [..., head_dim] into one tensor [..., plane.width] per plane."""

    @abstractmethod
    def decode(self, planes: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Decode planes into float32 [..., head_dim], in the domain ``encode`` was given."""

    def read(self, planes: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Decode for use in products, where order and scale can be undone on the small side.

        Float32 [..., head_dim] and a factor [..., 1] that ``decode`` would have applied (None: 1). Coordinate
        i + m * (head_dim / stride) stands at place i * stride + m.
        """
        return self.decode(planes), None

    @property
    def bytes_per_vector(self) -> int:
        return sum(plane.nbytes for plane in self.planes)

    @property
    def bits_per_value(self) -> float:
        """Bits of storage per value, scales included (windows and padding are counted by the cache)."""
        return 8 * self.bytes_per_vector / self.head_dim
