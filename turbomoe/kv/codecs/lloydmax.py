"""tq2, tq3, tq4: one Lloyd-Max level a coordinate and one matched-norm scale a vector.

TurboQuant_mse of arXiv 2504.19874 with the scale of EDEN-like codecs: what is stored is ||x|| / ||levels||, so the
decoded vector has the norm of the original. The input is already centred and rotated.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from turbomoe.kv.base import Codec, Plane
from turbomoe.kv.codebooks import levels, thresholds
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
        unit, peak = divide_by_peak(x.float())
        norm = tree_sum(unit * unit).sqrt()
        # Against the largest value the norm is at least 1, except for vectors of zeros.
        spread = unit * (math.sqrt(self.head_dim) / norm.clamp(min=1.0))
        index = torch.bucketize(spread, _table(self.bits, str(x.device), "thresholds"), out_int32=True, right=True)
        chosen = _table(self.bits, str(x.device), "levels")[index]
        scale = peak * (norm / tree_sum(chosen * chosen).sqrt())
        saturated = torch.where(torch.isfinite(peak), scale.clamp(max=torch.finfo(torch.float32).max), peak)
        return self._pack(index.to(torch.uint8)), to_scale(saturated)

    def decode(self, planes: tuple[torch.Tensor, ...]) -> torch.Tensor:
        codes, scales = planes
        index = self._unpack(codes).int()
        return _table(self.bits, str(codes.device), "levels")[index] * scales.float()

    def _pack(self, index: torch.Tensor) -> torch.Tensor:
        if self.bits != 3:
            return pack(index, self.bits)
        return torch.cat((pack(index & 3, 2), pack(index >> 2, 1)), dim=-1)

    def _unpack(self, codes: torch.Tensor) -> torch.Tensor:
        if self.bits != 3:
            return unpack(codes, self.bits)
        low, high = codes.split((self.head_dim // 4, self.head_dim // 8), dim=-1)
        return unpack(low, 2) | unpack(high, 1) << 2


def divide_by_peak(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., D] divided by its largest magnitude, and that magnitude [..., 1]; zeros where it is 0, NaN or infinite.

    Squares of the quotient neither overflow nor vanish, whatever the size of x.
    """
    peak = x.abs().amax(-1, keepdim=True)
    usable = (peak > 0) & torch.isfinite(peak)
    return torch.where(usable, x / peak, 0.0), peak


@lru_cache(maxsize=32)
def _table(bits: int, device: str, kind: str) -> torch.Tensor:
    values = levels(bits) if kind == "levels" else thresholds(bits)
    return torch.tensor(values, dtype=torch.float32, device=device)
