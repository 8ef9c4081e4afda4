"""Decoders of the 32-value formats of GGUF: Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0.

A block is an fp16 scale d, for the ``_1`` formats an fp16 minimum m, then the codes q. A value is ``d * (q - zero)``
or ``d * q + m``. Codes of 4 and 5 bits keep values 0..15 in the low nibbles of 16 bytes and 16..31 in the high ones;
the fifth bits are 32 bits in front of them. Layout: GGUF, ``ggml-common.h``.

Each decoder takes blocks uint8 [n, bytes] and fills out float32 [n, 32] (contiguous).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from turbomoe.files.block_bits import column, halves, nibbles, words


def q4_0(blocks: Tensor, out: Tensor) -> None:
    """2 bytes d, 16 bytes of nibbles; zero is 8."""
    codes = nibbles(words(blocks, 2, 18)).view(torch.int8).view(-1, 32)
    out.copy_(codes.sub_(8)).mul_(halves(blocks, 0))


def q4_1(blocks: Tensor, out: Tensor) -> None:
    """2 bytes d, 2 bytes m, 16 bytes of nibbles."""
    codes = nibbles(words(blocks, 4, 20)).view(torch.uint8).view(-1, 32)
    scale, minimum = halves(blocks, 0, 2).split(1, dim=1)
    out.copy_(codes).mul_(scale).add_(minimum)


def q5_0(blocks: Tensor, out: Tensor) -> None:
    """2 bytes d, 4 bytes of fifth bits, 16 bytes of nibbles; zero is 16."""
    codes = _five_bits(blocks, 2).view(torch.int8).view(-1, 32)
    out.copy_(codes.sub_(16)).mul_(halves(blocks, 0))


def q5_1(blocks: Tensor, out: Tensor) -> None:
    """2 bytes d, 2 bytes m, 4 bytes of fifth bits, 16 bytes of nibbles."""
    codes = _five_bits(blocks, 4).view(torch.uint8).view(-1, 32)
    scale, minimum = halves(blocks, 0, 2).split(1, dim=1)
    out.copy_(codes).mul_(scale).add_(minimum)


def q8_0(blocks: Tensor, out: Tensor) -> None:
    """2 bytes d, 32 signed bytes."""
    out.copy_(blocks[:, 2:].view(torch.int8)).mul_(halves(blocks, 0))


def _five_bits(blocks: Tensor, start: int) -> Tensor:
    """Codes of 5 bits, one to a byte: int64 [n, 4]. The fifth bits begin at byte ``start``, the nibbles follow."""
    fifth = column(blocks, start, start + 4).int()
    high = _fifth_bits(blocks.device).index_select(0, fifth.view(-1)).view(-1, 4)
    return nibbles(words(blocks, start + 4, start + 20)).view(-1, 4).bitwise_or_(high)


@cache
def _fifth_bits(device: torch.device) -> Tensor:
    """For each byte, its bits spread over a word: byte j of the word is 16 times bit j. int64 [256]."""
    bits = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1
    return (bits * 16).to(torch.uint8).view(torch.int64).view(-1).to(device)
