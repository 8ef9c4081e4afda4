"""The randomized Hadamard rotation: random signs, then a normalised Walsh-Hadamard transform.

It is orthogonal, costs D log2 D additions, and makes the coordinates of any one vector close to Gaussian. Each
butterfly is an elementwise addition, so a vector's result has the same bits whatever batch or chunk it came in:
codes written during prefill equal codes written token by token. A matrix product would not give that.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import torch

from turbomoe.errors import SettingsError

SIGN_SEED = "turbomoe randomized hadamard 1"  # part of every stored cache: changing it changes what codes mean


def require_power_of_two(head_dim: int, wanted_by: str) -> None:
    """Raise ``SettingsError`` unless a vector of ``head_dim`` values can be rotated (a power of two, 8 or more)."""
    if head_dim >= 8 and head_dim & (head_dim - 1) == 0:
        return
    raise SettingsError(
        f"{wanted_by} cannot store heads of {head_dim} values",
        why="the Hadamard rotation needs a power of two, 8 or more",
        fix="choose q8_0 (heads of a multiple of 32) or bf16 for this model",
    )


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Normalised Walsh-Hadamard transform (Sylvester order) over the last axis, its own inverse.

    x [..., n], n a power of two, any float type; returns a fresh float32 tensor of the same shape.
    """
    n = x.shape[-1]
    require_power_of_two(n, "the Hadamard transform")
    y, half = x.float(), n // 2
    for _ in range(n.bit_length() - 1):
        # Sum and difference of the halves, interleaved: after log2(n) rounds every axis has been transformed once.
        low, high = y[..., :half], y[..., half:]
        y = torch.stack((low + high, low - high), dim=-1).flatten(-2)
    return y * (1.0 / math.sqrt(n))


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Into the rotated domain: x [..., head_dim] of any float type to float32 of the same shape. Keeps dot products."""
    return hadamard(x * random_signs(x.shape[-1], str(x.device)))


def unrotate(y: torch.Tensor) -> torch.Tensor:
    """Out of the rotated domain: the inverse of ``rotate``, float32 [..., head_dim]."""
    return hadamard(y) * random_signs(y.shape[-1], str(y.device))


@lru_cache(maxsize=64)
def random_signs(n: int, device: str = "cpu") -> torch.Tensor:
    """The fixed signs for vectors of ``n`` values: float32 [n] of +-1, the same on every machine. Do not write to it.

    Bit i of the SHA-256 stream over (seed, n, block counter), lowest bit of each byte first; a set bit is -1.
    """
    blocks = (hashlib.sha256(f"{SIGN_SEED}/{n}/{block}".encode()).digest() for block in range(-(-n // 256)))
    stream = b"".join(blocks)
    signs = [1.0 - 2.0 * (stream[i // 8] >> i % 8 & 1) for i in range(n)]
    return torch.tensor(signs, dtype=torch.float32, device=device)
