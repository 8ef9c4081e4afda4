"""Decoders of the 256-value "K" formats of GGUF: Q4_K, Q5_K and Q6_K.

Q4_K and Q5_K: fp16 d and dmin, then eight 6-bit scales and eight 6-bit minima for runs of 32 values, packed in
12 bytes; a value is ``(d * scale) * q - dmin * minimum``. Q6_K: 4 + 2 bits a code, sixteen signed 8-bit scales for
runs of 16, then d; a value is ``(d * scale) * (q - 32)``. Layout: GGUF, ``ggml-common.h``.

Each decoder takes blocks uint8 [n, bytes] and fills out float32 [n, 256] (contiguous).
"""

from __future__ import annotations

import torch
from torch import Tensor

from turbomoe.files.block_bits import EACH_BYTE_ONE, EACH_BYTE_THREE, column, halves, nibbles, words


def q4_k(blocks: Tensor, out: Tensor) -> None:
    """2 bytes d, 2 bytes dmin, 12 bytes of scales and minima, 128 bytes of nibbles."""
    codes = nibbles(words(blocks, 16, 144).view(-1, 4, 4))
    _scale_and_shift(blocks, codes, out)


def q5_k(blocks: Tensor, out: Tensor) -> None:
    """As Q4_K, with 32 bytes of fifth bits before the nibbles: bit r of byte j belongs to value j of run r."""
    runs = torch.arange(8, device=blocks.device).view(8, 1)
    fifth = (words(blocks, 16, 48).view(-1, 1, 4) >> runs).bitwise_and_(EACH_BYTE_ONE)
    codes = nibbles(words(blocks, 48, 176).view(-1, 4, 4)).view(-1, 8, 4)
    _scale_and_shift(blocks, codes.bitwise_or_(fifth << 4), out)


def q6_k(blocks: Tensor, out: Tensor) -> None:
    """128 bytes of low nibbles, 64 bytes of upper bit pairs, 16 signed scales, 2 bytes d; zero is 32."""
    low = nibbles(words(blocks, 0, 128).view(-1, 2, 8)).view(-1, 2, 4, 4)
    pairs = torch.arange(0, 8, 2, device=blocks.device).view(4, 1)
    upper = (words(blocks, 128, 192).view(-1, 2, 1, 4) >> pairs).bitwise_and_(EACH_BYTE_THREE)
    codes = low.bitwise_or_(upper << 4).view(torch.int8).view(-1, 16, 16).sub_(32)
    scales = column(blocks, 192, 208).view(torch.int8).float() * halves(blocks, 208)
    out.view(-1, 16, 16).copy_(codes).mul_(scales.unsqueeze(-1))


def _scale_and_shift(blocks: Tensor, codes: Tensor, out: Tensor) -> None:
    """Fill ``out`` from unsigned codes, one to a byte, 256 a block, and the scales in the block's first 16 bytes."""
    factors = _six_bit_pairs(column(blocks, 4, 16)).float() * halves(blocks, 0, 2).unsqueeze(-1)
    scales, minima = factors.unsqueeze(-1).unbind(1)
    out.view(-1, 8, 32).copy_(codes.view(torch.uint8).view(-1, 8, 32)).mul_(scales).sub_(minima)


def _six_bit_pairs(packed: Tensor) -> Tensor:
    """Unpack uint8 [n, 12] to the eight scales and the eight minima of each block: uint8 [n, 2, 8].

    Bytes 0-3 hold scales 0-3 in their low 6 bits and the top pairs of scales 4-7 above them; bytes 4-7 the same for
    the minima; bytes 8-11 the low nibbles of scales 4-7 (low half) and of minima 4-7 (high half).
    """
    fours = packed.view(torch.int32)
    first, rest = fours[:, :2], fours[:, 2]
    late = torch.stack((rest & 0x0F0F0F0F, (rest >> 4) & 0x0F0F0F0F), 1) | ((first >> 2) & 0x30303030)
    return torch.stack((first & 0x3F3F3F3F, late), 2).view(torch.uint8)
