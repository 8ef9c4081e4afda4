"""Tensors as numpy arrays and back, bit by bit: types that numpy lacks travel as unsigned integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from turbomoe.files.array_file import TYPE_NAMES, LateArray
from turbomoe.kv.snapshot import Part

BITS = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8, torch.float8_e5m2: torch.uint8}


def numpy_type(dtype: torch.dtype) -> np.dtype[Any]:
    """The type under which tensors of ``dtype`` are stored."""
    return torch.empty(0, dtype=BITS.get(dtype, dtype)).numpy().dtype


def to_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """The bits of a tensor on any device."""
    here = tensor.contiguous().cpu()
    return here.view(BITS.get(here.dtype, here.dtype)).numpy()


def to_tensor(array: npt.NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
    """The tensor of ``dtype`` that ``array`` holds the bits of."""
    return torch.from_numpy(array).view(dtype)


def entry(part: Part) -> tuple[str, tuple[int, ...]]:
    """Type and shape of a part of a cache, as ``ArrayFile.table`` has them."""
    return TYPE_NAMES[numpy_type(part.dtype).str], part.shape


def late(part: Part) -> LateArray:
    """A part of a cache, read out when its turn to be written comes."""
    return LateArray(numpy_type(part.dtype), part.shape, lambda: to_numpy(part.read()))
