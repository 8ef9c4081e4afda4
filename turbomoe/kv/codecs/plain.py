"""Codecs that keep every value in a floating-point type: f32, f16, bf16."""

from __future__ import annotations

import torch

from turbomoe.kv.base import Codec, Plane


class PlainCodec(Codec):
    """Values converted to ``dtype`` by IEEE rounding (f16 turns values beyond 65504 into infinity)."""

    rotated = False

    def __init__(self, name: str, dtype: torch.dtype, head_dim: int) -> None:
        super().__init__(head_dim)
        self.name, self.dtype = name, dtype

    @property
    def planes(self) -> tuple[Plane, ...]:
        return (Plane("values", self.dtype, self.head_dim),)

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (x.to(self.dtype),)

    def decode(self, planes: tuple[torch.Tensor, ...]) -> torch.Tensor:
        (values,) = planes
        return values.float()
