"""What every launch asks of the device and of a side of the cache."""

from __future__ import annotations

import functools
import os

import torch

from turbomoe.kv.kernels.layout import column_dims, table
from turbomoe.kv.layer import Side


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which knows no inline assembly."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.lru_cache(maxsize=8)
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few for the interpreter, so that it too sees work shared between programs."""
    return 4 if device.type == "cpu" else int(torch.cuda.get_device_properties(device).multi_processor_count)


def kind_of(side: Side) -> str:
    """The codec's name; what stands in for it where there are no pages."""
    return "bf16" if side.codec is None else side.codec.name


def code_bytes(side: Side) -> int:
    """Bytes of a vector's codes."""
    return 0 if side.codec is None else side.codec.planes[0].nbytes


def stored(side: Side, dim: int, for_scores: bool, halves: int, device: str) -> tuple[torch.Tensor, ...]:
    """(codes, scales, dims of the columns, table, columns of the dims): anything stands in for what a kind lacks."""
    name = kind_of(side)
    dims, columns = column_dims(name, dim, for_scores, halves, device)
    if side.codec is None:
        return side.ring, side.ring, dims, table(name, for_scores, device), columns
    codes = side.planes[0]
    return codes, side.planes[1] if len(side.planes) > 1 else codes, dims, table(name, for_scores, device), columns
