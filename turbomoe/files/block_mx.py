"""Decoder of MXFP4: 32 four-bit floats (e2m1) under one power-of-two scale (e8m0).

OCP Microscaling Formats 1.0. As in GGUF the numbers are stored doubled and the scale halved, so that they are whole;
scale byte 255, not-a-number in the OCP paper, is 2^127 here as in ggml.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from turbomoe.files.block_bits import column, nibbles, words

DOUBLED_E2M1 = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0)


def mxfp4(blocks: Tensor, out: Tensor) -> None:
    """1 byte scale, 16 bytes of nibbles: blocks uint8 [n, 17] fill out float32 [n, 32] (contiguous)."""
    numbers, scales = _tables(blocks.device)
    codes = nibbles(words(blocks, 1, 17)).view(torch.uint8).view(-1).int()
    torch.index_select(numbers, 0, codes, out=out.view(-1))
    out.mul_(scales.index_select(0, column(blocks, 0, 1).view(-1).int()).unsqueeze(1))


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The 16 numbers, and for each scale byte e the float32 2^(e - 128)."""
    exponents = torch.arange(256, dtype=torch.float64) - 128
    return torch.tensor(DOUBLED_E2M1, device=device), torch.exp2(exponents).float().to(device)
