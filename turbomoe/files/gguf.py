"""GGUF model files: opened by mapping, checked whole before use, tensors handed out packed or as numbers.

The reader is turbomoe's own: nothing in a file is believed before it was compared with the file's size
(``gguf_cursor.py``, ``gguf_header.py``); split series are opened by any member (``gguf_series.py``).
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from turbomoe.errors import ModelError, ModelFileError
from turbomoe.files.base import ModelSource
from turbomoe.files.blocks import dequantise
from turbomoe.files.gguf_series import Shard, open_series
from turbomoe.files.identity import SAMPLE_BYTES, sample_offsets


@dataclass(frozen=True)
class _Place:
    """Where a tensor's bytes lie: in the bytes of which shard, from where to where."""

    bytes: torch.Tensor
    start: int
    stop: int
    mapping: mmap.mmap


class GgufFile(ModelSource):
    """A GGUF file or split series. See ``ModelSource`` for the contract; ``paths`` lists its files in order.

    ``metadata`` holds the key-values of the first file as int, float, bool, str and sequences of them, which read the
    file when asked; text that is not UTF-8 has lone surrogates (``surrogateescape``). The files must not shrink while
    they are open: reading a mapped page that is gone ends the process.
    """

    kind = "gguf"

    def __init__(self, path: Path, shards: list[Shard]) -> None:
        self.path = path
        self.paths = tuple(shard.path for shard in shards)
        self.metadata = shards[0].header.metadata
        self.tensors = {entry.info.name: entry.info for shard in shards for entry in shard.header.tensors}
        self._identity = _identity(shards)
        self._places: dict[str, _Place] | None = _places(shards)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GgufFile:
        """Map and check a file, or the whole series that it belongs to. Raises ``ModelFileError`` alone."""
        path = Path(path)
        return cls(path, open_series(path))

    def raw(self, name: str) -> torch.Tensor:
        """Packed bytes: uint8 [nbytes], a view of the read-only mapping. Writing to it ends the process."""
        if self._places is None:
            raise ModelFileError(self.path, "it was closed", field=f"tensor {name!r}")
        if not (place := self._places.get(name)):
            raise ModelError(f"{self.path} has no tensor {name!r}")
        return place.bytes[place.start : place.stop]

    def load(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The tensor as numbers of ``dtype`` in its torch shape: fresh memory that the caller owns."""
        packed = self.raw(name)
        info = self.tensors[name]
        return dequantise(packed, info.format, info.shape, dtype)

    def release(self, name: str) -> None:
        """Let the system take back the pages of a tensor, which count as this process's memory once they were read."""
        if self._places is None or not (place := self._places.get(name)):
            return
        start = place.start // mmap.PAGESIZE * mmap.PAGESIZE
        if place.stop > start and isinstance(place.mapping, mmap.mmap):
            place.mapping.madvise(mmap.MADV_DONTNEED, start, place.stop - start)

    def identity(self) -> str:
        """Hex SHA-256 over headers, sizes and 32 pages of weights a file: it names a model, it does not vouch for it.

        Fine-tuned sisters share headers and sizes to the byte; the pages tell them apart without reading the rest.
        """
        return self._identity

    def close(self) -> None:
        """Let go of the mapping; it disappears with the last view that ``raw`` handed out."""
        self._places = None


def _places(shards: list[Shard]) -> dict[str, _Place]:
    places = {}
    for shard in shards:
        mapped = _as_tensor(shard.data)
        for entry in shard.header.tensors:
            places[entry.info.name] = _Place(mapped, entry.start, entry.stop, shard.data)
    return places


def _as_tensor(data: mmap.mmap) -> torch.Tensor:
    """The mapping as uint8 [size] without a copy.

    torch warns about buffers that cannot be written, each process once, so the address is passed instead.
    """
    view = np.frombuffer(data, dtype=np.uint8)
    window = (ctypes.c_uint8 * len(data)).from_address(view.ctypes.data)
    window.mapping = view  # type: ignore[attr-defined]  # keeps the mapping alive as long as the tensor
    return torch.frombuffer(window, dtype=torch.uint8)


def _identity(shards: list[Shard]) -> str:
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(len(shard.data).to_bytes(8, "little"))
        digest.update(memoryview(shard.data)[: shard.header.data_start])  # in place: a slice would copy a header
        for at in sample_offsets(shard.header.data_start, len(shard.data)):
            digest.update(shard.data[at : at + SAMPLE_BYTES])
    return digest.hexdigest()
