"""q8_0: blocks of 32 values with one fp16 scale each, the arithmetic of ggml's Q8_0."""

from __future__ import annotations

import torch

from turbomoe.errors import SettingsError
from turbomoe.kv.base import Codec, Plane
from turbomoe.kv.codecs.scales import to_scale

BLOCK = 32


class Q8Codec(Codec):
    """8 bits a value and a scale of amax/127 for each 32 values; not rotated.

    A block with a NaN or an infinity decodes to NaN throughout. Scales saturate at 65504 (values beyond 8.3e6 are
    clipped) and vanish below 3e-8.
    """

    name = "q8_0"
    rotated = False

    def __init__(self, head_dim: int) -> None:
        super().__init__(head_dim)
        if head_dim <= 0 or head_dim % BLOCK:
            raise SettingsError(
                f"q8_0 cannot store heads of {head_dim} values",
                why="it works on blocks of 32",
                fix="choose bf16 for this model",
            )

    @property
    def planes(self) -> tuple[Plane, ...]:
        return (
            Plane("codes", torch.int8, self.head_dim),
            Plane("scales", torch.float16, self.head_dim // BLOCK),
        )

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        blocks = x.float().unflatten(-1, (-1, BLOCK))
        step = blocks.abs().amax(-1, keepdim=True) / 127
        finite = torch.isfinite(step)
        # Steps so small that their inverse overflows get code 0, and so do NaN and infinite ones.
        usable = finite & (step >= torch.finfo(torch.float32).tiny)
        codes = torch.where(usable, round_half_away(blocks * (1 / step)), 0.0)
        scales = to_scale(torch.where(finite, step, torch.nan))
        return codes.to(torch.int8).flatten(-2), scales.squeeze(-1)

    def decode(self, planes: tuple[torch.Tensor, ...]) -> torch.Tensor:
        codes, scales = planes
        blocks: torch.Tensor = codes.float().unflatten(-1, (-1, BLOCK))
        return blocks.mul_(scales.float().unsqueeze(-1)).flatten(-2)


def round_half_away(x: torch.Tensor) -> torch.Tensor:
    """Round to the nearest integer, halves away from zero, as C's ``roundf`` (torch rounds halves to even)."""
    size = x.abs()
    whole = size.floor()
    rounded: torch.Tensor = whole + (size - whole >= 0.5)
    return torch.copysign(rounded, x)
