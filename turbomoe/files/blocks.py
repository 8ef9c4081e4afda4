"""Block formats of model files: how many bytes hold how many values, and how to get float numbers back.

To add a format: write its decoder beside its relatives (``block_q32.py``, ``block_k.py``, ``block_mx.py``), add one
line to ``FORMATS``; the tests in ``tests/files/test_blocks.py`` then compare it with the ``gguf`` package bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turbomoe.errors import ModelError
from turbomoe.files import block_k, block_mx, block_q32

# Values decoded at a time: their numbers and codes stay in a core's second-level cache, and torch, which splits work
# from 32,768 elements on, keeps to one thread. Its threads wait for each other after every one of these small steps,
# which on a busy machine made decoding 20 times slower (SmolLM2: 5 to 22 s instead of 1).
CHUNK_VALUES = 32768 - 256

Decoder = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class BlockFormat:
    """One way of storing numbers: ``bytes`` packed bytes hold ``values`` values. ``type_id`` is its number in GGUF.

    ``coding`` is the torch dtype of plain floats (blocks of one value), else a decoder: it takes blocks uint8
    [n, bytes] and fills a contiguous float32 [n, values] in ggml's order of operations.
    """

    name: str
    type_id: int
    values: int
    bytes: int
    coding: torch.dtype | Decoder


FORMATS: dict[str, BlockFormat] = {
    block.name: block
    for block in (
        BlockFormat("F32", 0, 1, 4, torch.float32),
        BlockFormat("F16", 1, 1, 2, torch.float16),
        BlockFormat("BF16", 30, 1, 2, torch.bfloat16),
        BlockFormat("Q4_0", 2, 32, 18, block_q32.q4_0),
        BlockFormat("Q4_1", 3, 32, 20, block_q32.q4_1),
        BlockFormat("Q5_0", 6, 32, 22, block_q32.q5_0),
        BlockFormat("Q5_1", 7, 32, 24, block_q32.q5_1),
        BlockFormat("Q8_0", 8, 32, 34, block_q32.q8_0),
        BlockFormat("Q4_K", 12, 256, 144, block_k.q4_k),
        BlockFormat("Q5_K", 13, 256, 176, block_k.q5_k),
        BlockFormat("Q6_K", 14, 256, 210, block_k.q6_k),
        BlockFormat("MXFP4", 39, 32, 17, block_mx.mxfp4),
    )
}


def block_format(name: str) -> BlockFormat:
    """The format called ``name``; ``ModelError`` naming the known ones if there is none."""
    if known := FORMATS.get(name):
        return known
    raise ModelError(f"Block format {name!r} is not supported", why=f"Supported are {', '.join(FORMATS)}")


def row_bytes(format: str, cols: int) -> int:
    """Packed bytes of a row of ``cols`` values; ``ModelError`` unless the row is a whole number of blocks."""
    block = block_format(format)
    if cols % block.values:
        raise ModelError(
            f"A row of {cols} values cannot be stored as {format}", why=f"{format} blocks hold {block.values} values"
        )
    return cols // block.values * block.bytes


def packed_bytes(format: str, shape: Sequence[int]) -> int:
    """Packed bytes of a tensor of this shape (slowest axis first; the last axis is the row)."""
    return math.prod(shape[:-1]) * row_bytes(format, shape[-1] if shape else 1)


def dequantise(raw: Tensor, format: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers out of packed blocks: a fresh tensor of ``shape`` and ``dtype`` on the device of ``raw``.

    ``raw`` is uint8 [packed bytes], contiguous, any alignment; it is only read. Arithmetic is float32 in ggml's
    order, rounded once to ``dtype`` at the end. ``ModelError`` if bytes and shape do not agree.
    """
    block, expected = block_format(format), packed_bytes(format, shape)
    if raw.dtype != torch.uint8 or raw.ndim != 1 or len(raw) != expected:
        found = f"{tuple(raw.shape)} of {raw.dtype}"
        raise ModelError(f"A {format} tensor of shape {tuple(shape)} takes {expected} bytes, not {found}")
    if isinstance(block.coding, torch.dtype):
        return _convert(raw, block.coding, dtype).view(tuple(shape))
    blocks = raw.view(expected // block.bytes, block.bytes)
    return _decode_in_chunks(blocks, block.values, block.coding, dtype).view(tuple(shape))


def _convert(raw: Tensor, native: torch.dtype, dtype: torch.dtype) -> Tensor:
    """Copy plain floats; bytes that are not aligned for their type go through a second copy."""
    if raw.storage_offset() % native.itemsize or raw.data_ptr() % native.itemsize:
        raw = raw.clone()
    return raw.view(native).to(dtype, copy=True)


def _decode_in_chunks(blocks: Tensor, values: int, decode: Decoder, dtype: torch.dtype) -> Tensor:
    """Decode ``CHUNK_VALUES`` at a time; float32 goes straight to the result."""
    out = torch.empty(len(blocks), values, dtype=dtype, device=blocks.device)
    step = CHUNK_VALUES // values
    for start in range(0, len(blocks), step):
        target = out[start : start + step]
        numbers = target if dtype == torch.float32 else torch.empty_like(target, dtype=torch.float32)
        decode(blocks[start : start + step], numbers)
        if numbers is not target:
            target.copy_(numbers)
    return out
