"""Planar packing of small integers: byte i of a plane holds values that lie far apart in the vector.

With 8/b values to a byte and w = D*b/8 bytes, byte i holds dims i, i+w, i+2w... from its lowest bits up. So one
shift of the whole plane yields a contiguous run of dims, on a CPU and in a GPU kernel alike.
"""

from __future__ import annotations

import torch


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 codes [..., D] below ``2**bits`` (bits 1, 2 or 4) into uint8 [..., D * bits / 8]."""
    per_byte = 8 // bits
    runs = codes.unflatten(-1, (per_byte, -1)).unbind(-2)
    packed: torch.Tensor = runs[0].clone()
    for position, run in enumerate(runs[1:], start=1):
        packed |= run << position * bits
    return packed
