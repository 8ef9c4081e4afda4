"""What the block decoders share: reading columns out of packed blocks, eight bytes at a time.

A column is copied out of its blocks before it is viewed as a wider type: blocks are 17 to 210 bytes long, so nothing
inside them is aligned.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOW_NIBBLES = 0x0F0F0F0F0F0F0F0F
EACH_BYTE_ONE = 0x0101010101010101
EACH_BYTE_THREE = 0x0303030303030303


def column(blocks: Tensor, start: int, stop: int) -> Tensor:
    """Bytes ``start..stop`` of every block: a fresh contiguous uint8 [n, stop - start]."""
    return blocks[:, start:stop].clone(memory_format=torch.contiguous_format)


def halves(blocks: Tensor, start: int, count: int = 1) -> Tensor:
    """The ``count`` fp16 numbers from byte ``start`` of every block on: float32 [n, count]."""
    return column(blocks, start, start + 2 * count).view(torch.float16).float()


def words(blocks: Tensor, start: int, stop: int) -> Tensor:
    """Bytes ``start..stop`` of every block, eight to a word: int64 [n, (stop - start) / 8]."""
    return column(blocks, start, stop).view(torch.int64)


def nibbles(packed: Tensor) -> Tensor:
    """Split words of nibbles: int64 [..., w] gives int64 [..., 2, w], first the low nibbles, then the high ones.

    Seen as bytes, each result byte holds one number from 0 to 15.
    """
    # An arithmetic shift drags the sign bit in; the mask removes it again.
    return torch.stack((packed & LOW_NIBBLES, (packed >> 4) & LOW_NIBBLES), dim=-2)
