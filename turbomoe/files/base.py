"""The contract of a model file: names, shapes, formats and bytes, checked before anyone uses them.

A source is opened once, memory-mapped and read-only. ``GgufFile`` (``gguf.py``) and ``SafetensorsFolder``
(``safetensors.py``) implement it; nothing here knows what a model is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the file declares it, after its range was checked against the file.

    ``shape`` is in torch order (slowest axis first; GGUF stores the reverse). ``format`` is a name of
    ``files.blocks.FORMATS`` (``F32``, ``BF16``, ``Q4_K``...). ``nbytes`` counts the packed bytes.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    nbytes: int


class ModelSource(ABC):
    """An opened model: read-only, lazy, safe to share between threads. Not modified by any call."""

    path: Path
    kind: str  # "gguf" or "safetensors"
    metadata: Mapping[str, Any]  # GGUF key-values; for safetensors the parsed JSON files by stem ("config"...)
    tensors: Mapping[str, TensorInfo]

    @abstractmethod
    def raw(self, name: str) -> torch.Tensor:
        """Packed bytes of a tensor: uint8 [nbytes], a view of the mapping (never write to it)."""

    @abstractmethod
    def load(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The tensor dequantised to ``dtype`` in its torch shape: a fresh tensor that the caller owns."""

    def release(self, name: str) -> None:  # noqa: B027  (a source without a mapping has nothing to do)
        """Say that a tensor's bytes are not needed any more: what its mapping takes of memory may go.

        Reading it again stays possible and gives the same bytes.
        """

    @abstractmethod
    def identity(self) -> str:
        """Hex SHA-256 over the header(s) and sizes: names this model in caches, profiles and sessions."""

    @abstractmethod
    def close(self) -> None:
        """Drop the mapping. Views handed out by ``raw`` stay valid."""
