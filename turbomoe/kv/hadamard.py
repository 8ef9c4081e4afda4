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

CACHED_VALUES = 1 << 16  # rows are transformed in chunks that stay in a core's cache: 2-3 times faster on long inputs
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


@torch.no_grad()
def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Normalised Walsh-Hadamard transform (Sylvester order) over the last axis, its own inverse.

    x [..., n], n a power of two, any float type; returns a fresh float32 tensor of the same shape, without gradient.
    """
    n = x.shape[-1]
    require_power_of_two(n, "the Hadamard transform")
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    rows = max(1, CACHED_VALUES // n)
    for source, target in zip(x.reshape(-1, n).split(rows), out.view(-1, n).split(rows), strict=True):
        torch.mul(_butterflies(source.float()).t(), 1.0 / math.sqrt(n), out=target)
    return out


def _butterflies(rows: torch.Tensor) -> torch.Tensor:
    """The transform, not normalised and transposed: float32 [count, n] to [n, count].

    Each of log2(n) rounds writes the sums and differences of the two halves, interleaved; every round has the same
    shape, so two buffers and their views serve all. Vectors lie in columns, which makes each access contiguous.
    """
    n = rows.shape[1]
    here = rows.t().clone(memory_format=torch.contiguous_format)
    there = torch.empty_like(here)
    reads, writes = _halves(here), _neighbours(there)
    next_reads, next_writes = _halves(there), _neighbours(here)
    for _ in range(n.bit_length() - 1):
        torch.add(*reads, out=writes[0])
        torch.sub(*reads, out=writes[1])
        reads, writes, next_reads, next_writes = next_reads, next_writes, reads, writes
        here, there = there, here
    return here


def _halves(columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    half = columns.shape[0] // 2
    return columns[:half], columns[half:]


def _neighbours(columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return columns[0::2], columns[1::2]


@torch.no_grad()
def rotate(x: torch.Tensor) -> torch.Tensor:
    """Into the rotated domain: x [..., head_dim] of any float type to float32 of the same shape. Keeps dot products."""
    return hadamard(x * random_signs(x.shape[-1], str(x.device)))


@torch.no_grad()
def unrotate(y: torch.Tensor) -> torch.Tensor:
    """Out of the rotated domain: the inverse of ``rotate``, float32 [..., head_dim]."""
    return hadamard(y) * random_signs(y.shape[-1], str(y.device))


@lru_cache(maxsize=16)
def rotation(n: int, device: str = "cpu", stride: int = 1) -> torch.Tensor:
    """``rotate`` as a matrix R, float32 [n, n]: for what is not stored, as a product's bits depend on its batch.

    ``x @ R`` rotates and ``y @ R.t()`` turns back. Columns stand in the order of ``Codec.read``.
    """
    return rotate(torch.eye(n, device=device)).view(n, stride, -1).transpose(1, 2).reshape(n, n)


@lru_cache(maxsize=64)
def random_signs(n: int, device: str = "cpu") -> torch.Tensor:
    """The fixed signs for vectors of ``n`` values: float32 [n] of +-1, the same on every machine. Do not write to it.

    Bit i of the SHA-256 stream over (seed, n, block counter), lowest bit of each byte first; a set bit is -1.
    """
    blocks = (hashlib.sha256(f"{SIGN_SEED}/{n}/{block}".encode()).digest() for block in range(-(-n // 256)))
    stream = b"".join(blocks)
    signs = [1.0 - 2.0 * (stream[i // 8] >> i % 8 & 1) for i in range(n)]
    return torch.tensor(signs, dtype=torch.float32, device=device)
