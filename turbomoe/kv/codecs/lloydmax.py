"""tq2, tq3, tq4: one Lloyd-Max level a coordinate and one matched-norm scale a vector.

TurboQuant_mse of arXiv 2504.19874 with the scale of EDEN-like codecs: what is stored is ||x|| / ||levels||, so the
decoded vector has the norm of the original. The input is already centred and rotated.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from turbomoe.kv.base import Codec, Plane
from turbomoe.kv.codebooks import POSITIVE_LEVELS, levels, thresholds
from turbomoe.kv.codecs.packing import pack, unpack
from turbomoe.kv.codecs.scales import to_scale, tree_sum
from turbomoe.kv.hadamard import require_power_of_two


class LloydMaxCodec(Codec):
    """``bits`` (2, 3 or 4) a coordinate, packed in planes, and an fp16 scale a vector.

    Codes count levels from the most negative up. 2 bits: one 2-bit plane of D/4 bytes; 4 bits: one 4-bit plane of
    D/2 bytes; 3 bits: a 2-bit plane of the low bits, then a 1-bit plane of D/8 bytes. A vector with a NaN or an
    infinity decodes to NaN throughout, a zero vector to zeros. The scale (about the rms of the vector) saturates
    at 65504, keeps fewer digits below 6e-5 and vanishes below 3e-8.
    """

    rotated = True

    def __init__(self, bits: int, head_dim: int) -> None:
        super().__init__(head_dim)
        self.name, self.bits = f"tq{bits}", bits
        require_power_of_two(head_dim, self.name)

    @property
    def planes(self) -> tuple[Plane, ...]:
        return (
            Plane("codes", torch.uint8, self.head_dim * self.bits // 8),
            Plane("scales", torch.float16, 1),
        )

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = x.float()
        # Against its largest magnitude a vector's squares neither overflow nor vanish; NaN and infinity become NaN.
        peak = x.abs().amax(-1, keepdim=True)
        unit = x / torch.where(peak > 0, peak, 1.0)
        norm = tree_sum(unit * unit).sqrt()
        # Only a vector of zeros has a norm below 1 here.
        spread = unit * (math.sqrt(self.head_dim) / norm.clamp(min=1.0))
        step = nearest_level(spread.abs(), self.bits)
        chosen = look_up(_positive_levels(self.bits, str(x.device)), step)
        scale = peak * (norm / tree_sum(chosen * chosen).sqrt())
        # Counted from the most negative level up, steps away from zero fall on the negative side.
        half = 1 << self.bits - 1
        index = step ^ torch.where(spread < 0, half - 1, half).to(torch.uint8)
        return self._pack(index), to_scale(scale)

    def decode(self, planes: tuple[torch.Tensor, ...]) -> torch.Tensor:
        codes, scales = planes
        values = look_up(_levels(self.bits, str(codes.device)), self._unpack(codes))
        return values.mul_(scales.float())

    def _pack(self, index: torch.Tensor) -> torch.Tensor:
        if self.bits != 3:
            return pack(index, self.bits)
        return torch.cat((pack(index & 3, 2), pack(index >> 2, 1)), dim=-1)

    def _unpack(self, codes: torch.Tensor) -> torch.Tensor:
        if self.bits != 3:
            return unpack(codes, self.bits)
        low, high = codes.split((self.head_dim // 4, self.head_dim // 8), dim=-1)
        return unpack(low, 2).bitwise_or_(unpack(high, 1).bitwise_left_shift_(2))


def nearest_level(size: torch.Tensor, bits: int) -> torch.Tensor:
    """Which positive level is nearest to each magnitude: uint8, 0 for the smallest, the larger one on a tie, 0 for NaN.

    One comparison a border: several times faster than a binary search on a CPU, and the same bits on any device.
    """
    borders = thresholds(bits)[1 << bits - 1 :]
    step = torch.zeros(size.shape, dtype=torch.uint8, device=size.device)
    for border in borders:
        step += size >= border
    return step


def look_up(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``table[index]`` for a flat float32 table and uint8 indices: a fresh tensor of the shape of ``index``.

    ``index_select`` over int32 is four times as fast as indexing here.
    """
    return table.index_select(0, index.reshape(-1).int()).view(index.shape)


@lru_cache(maxsize=32)
def _levels(bits: int, device: str) -> torch.Tensor:
    return torch.tensor(levels(bits), dtype=torch.float32, device=device)


@lru_cache(maxsize=32)
def _positive_levels(bits: int, device: str) -> torch.Tensor:
    return torch.tensor(POSITIVE_LEVELS[bits], dtype=torch.float32, device=device)
