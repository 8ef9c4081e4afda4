"""tq2, tq3, tq4: one Lloyd-Max level a coordinate and one matched-norm scale a vector.

TurboQuant_mse of arXiv 2504.19874 with the scale of EDEN-like codecs: what is stored is ||x|| / ||levels||, so the
decoded vector has the norm of the original. The input is already centred and rotated.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from turbomoe.kv.base import Codec, Plane
from turbomoe.kv.codebooks import POSITIVE_LEVELS, levels, thresholds
from turbomoe.kv.codecs.packing import pack
from turbomoe.kv.codecs.scales import matched_scale, spread_out
from turbomoe.kv.hadamard import require_power_of_two


class LloydMaxCodec(Codec):
    """``bits`` (2, 3 or 4) a coordinate, packed in planes, and an fp16 scale a vector.

    Codes count levels from the most negative up. 2 bits: one 2-bit plane of D/4 bytes; 4 bits: one 4-bit plane of
    D/2 bytes; 3 bits: a 2-bit plane of the low bits, then a 1-bit plane of D/8 bytes. A vector with a NaN or an
    infinity decodes to NaN throughout, a zero vector to zeros. The scale (about the rms of the vector) saturates
    at 65504, keeps fewer digits below 6e-5 and vanishes below 3e-8.
    """

    rotated = True
    version = 2  # other levels in 1

    def __init__(self, bits: int, head_dim: int) -> None:
        super().__init__(head_dim)
        self.name, self.bits = f"tq{bits}", bits
        require_power_of_two(head_dim, self.name)
        self.stride = 2 if bits == 4 else 4

    @property
    def planes(self) -> tuple[Plane, ...]:
        return (
            Plane("codes", torch.uint8, self.head_dim * self.bits // 8),
            Plane("scales", torch.float16, 1),
        )

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        spread, peak, norm = spread_out(x.float())
        # Compared with borders, NaN takes the first level.
        step = nearest_level(spread.abs(), self.bits)
        chosen = look_up(_positive_levels(self.bits, str(x.device)), step.int())
        # Codes count from the most negative level up: steps away from zero run backwards on the negative side.
        positive, flip = 1 << self.bits - 1, (1 << self.bits) - 1
        index = (step ^ positive) ^ (spread < 0).to(torch.uint8).mul_(flip)
        return self._pack(index), matched_scale(chosen, peak, norm)

    def decode(self, planes: tuple[torch.Tensor, ...]) -> torch.Tensor:
        codes, scales = planes
        words, scale = self._words(codes), scales.float()
        out = torch.empty(*codes.shape[:-1], self.head_dim, dtype=torch.float32, device=codes.device)
        runs = out.split(words.shape[-1], dim=-1)
        for table, run in zip(_word_tables(self.bits, str(codes.device)), runs, strict=True):
            torch.mul(look_up(table, words), scale, out=run)
        return out

    def read(self, planes: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
        codes, scales = planes
        words = self._words(codes)
        values = look_up(_row_table(self.bits, str(codes.device)), words)
        return values.view(torch.float32).view(*codes.shape[:-1], self.head_dim), scales.float()

    def _pack(self, index: torch.Tensor) -> torch.Tensor:
        if self.bits != 3:
            return pack(index, self.bits)
        return torch.cat((pack(index & 3, 2), pack(index >> 2, 1)), dim=-1)

    def _words(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes as int32 words, each with all the bits of the 8/b dims that share a byte (of the 2-bit plane in tq3).

        Byte i of that plane meets byte i mod D/8 of the 1-bit plane, of which it needs the even bits or the odd ones:
        they go to bits 8, 10, 12 and 14.
        """
        if self.bits != 3:
            return codes.int()
        low, high = codes.split((self.head_dim // 4, self.head_dim // 8), dim=-1)
        even_and_odd = torch.cat((high, high >> 1), dim=-1).bitwise_and_(0x55)
        return even_and_odd.int().bitwise_left_shift_(8).bitwise_or_(low)


def nearest_level(size: torch.Tensor, bits: int) -> torch.Tensor:
    """Which positive level is nearest to each magnitude: uint8, 0 for the smallest, the larger one on a tie, 0 for NaN.

    One comparison a border: several times faster than a binary search on a CPU.
    """
    borders = thresholds(bits)[1 << bits - 1 :]
    step = torch.zeros(size.shape, dtype=torch.uint8, device=size.device)
    for border in borders:
        step += (size >= border).view(torch.uint8)
    return step


def look_up(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``table[index]`` for a flat table and int32 indices; on a CPU four times as fast as indexing."""
    return table.index_select(0, index.reshape(-1)).view(index.shape)


@lru_cache(maxsize=32)
def _positive_levels(bits: int, device: str) -> torch.Tensor:
    return torch.tensor(POSITIVE_LEVELS[bits], dtype=torch.float32, device=device)


@lru_cache(maxsize=32)
def _word_tables(bits: int, device: str) -> tuple[torch.Tensor, ...]:
    """For each of the dims in a word, its level by the word's value: float32 [256], for tq3 [0x5600]."""
    in_byte = 2 if bits == 3 else bits
    word = torch.arange(0x5600 if bits == 3 else 0x100)
    table = torch.tensor(levels(bits), dtype=torch.float32)
    codes = [word >> in_byte * k & (1 << in_byte) - 1 | (word >> 8 + 2 * k & 1) << 2 for k in range(8 // in_byte)]
    return tuple(table[code].to(device) for code in codes)


@lru_cache(maxsize=32)
def _row_table(bits: int, device: str) -> torch.Tensor:
    """All the dims of a word side by side, disguised as one complex number: a look-up then copies 8 or 16 bytes."""
    rows = torch.stack(_word_tables(bits, device), -1)
    return rows.view(torch.complex64 if rows.shape[-1] == 2 else torch.complex128).squeeze(-1)
