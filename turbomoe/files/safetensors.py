"""Model folders of safetensors files: one file or shards with an index, beside the JSON files that describe them.

The safetensors library checks the headers (lengths, offsets, holes, overlaps) and maps the files; what lies around
them is checked here. Format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from turbomoe.errors import ModelError, ModelFileError
from turbomoe.files.base import ModelSource, TensorInfo
from turbomoe.files.identity import SAMPLE_BYTES, sample_offsets
from turbomoe.files.json_file import JsonFolder
from turbomoe.files.safetensors_index import INDEX, find_shards

FORMAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
METADATA = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class SafetensorsFolder(ModelSource):
    """A folder with ``config.json`` and weights in safetensors. See ``ModelSource`` for the contract.

    ``metadata`` has the parsed files of ``METADATA`` that exist, by stem (``"config"``), each read when asked for.
    ``paths`` lists the weight files. The files must not shrink while they are open.
    """

    kind = "safetensors"

    def __init__(self, path: Path, paths: list[Path], metadata: JsonFolder) -> None:
        self.path, self.paths, self.metadata = path, tuple(paths), metadata
        self.tensors: dict[str, TensorInfo] = {}
        self._home: dict[str, Any] | None = {}
        for shard in paths:
            self._add(shard)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> SafetensorsFolder:
        """Open and check a folder, weights mapped and not read. Raises ``ModelFileError`` alone."""
        folder = Path(path)
        with _trouble_is_ours(folder):
            shards, index = find_shards(folder)
            metadata = JsonFolder(folder, METADATA)
            if "config" not in metadata:
                raise ModelFileError(folder, "it has no config.json, which says what the weights mean")
            metadata["config"]
            source = cls(folder, shards, metadata)
        source._check_index(index)
        return source

    def raw(self, name: str) -> torch.Tensor:
        """Packed bytes: uint8 [nbytes], a view of the mapping. Do not write to it."""
        return self._tensor(name).reshape(-1).view(torch.uint8)

    def load(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The tensor as numbers of ``dtype`` in its shape: fresh memory that the caller owns."""
        return self._tensor(name).to(dtype, copy=True)

    def identity(self) -> str:
        """Hex SHA-256 over config.json and, of each weight file, its size, header and 32 pages spread over it.

        Fine-tuned sisters share sizes and headers to the byte; the pages tell them apart without reading the rest.
        """
        with _trouble_is_ours(self.path):
            digest = hashlib.sha256((self.path / "config.json").read_bytes())
            for path in self.paths:
                _digest_samples(path, digest)
        return digest.hexdigest()

    def close(self) -> None:
        """Let go of the files; mappings disappear with the last view that ``raw`` handed out."""
        self._home = None

    def _tensor(self, name: str) -> torch.Tensor:
        if self._home is None:
            raise ModelFileError(self.path, "it was closed", field=f"tensor {name!r}")
        if not (file := self._home.get(name)):
            raise ModelError(f"{self.path} has no tensor {name!r}")
        with _trouble_is_ours(self.path, f"tensor {name!r}"):
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def _add(self, shard: Path) -> None:
        assert self._home is not None
        with _trouble_is_ours(shard):
            file: Any = safe_open(shard, framework="pt")
            for name in file.keys():  # noqa: SIM118  (the library's object is no mapping)
                if name in self.tensors:
                    raise ModelFileError(shard, "another shard holds it too", field=f"tensor {name!r}")
                view = file.get_slice(name)
                self.tensors[name] = _info(shard, name, tuple(view.get_shape()), view.get_dtype())
                self._home[name] = file

    def _check_index(self, index: dict[str, str]) -> None:
        for name, shard in index.items():
            if name not in self.tensors:
                reason = f"no shard holds the tensor {name!r}, which should be in {shard}"
                raise ModelFileError(self.path / INDEX, reason, field="weight_map")


def _info(shard: Path, name: str, shape: tuple[int, ...], dtype: str) -> TensorInfo:
    if dtype not in FORMAT_BYTES:
        known = ", ".join(FORMAT_BYTES)
        raise ModelFileError(shard, f"its format {dtype} is not supported (only {known})", field=f"tensor {name!r}")
    nbytes = FORMAT_BYTES[dtype]
    for size in shape:
        nbytes *= size
    return TensorInfo(name, shape, dtype, nbytes)


def _digest_samples(path: Path, digest: Any) -> None:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = file.read(8)
        digest.update(size.to_bytes(8, "little") + length + file.read(int.from_bytes(length, "little")))
        for at in sample_offsets(0, size):
            file.seek(at)
            digest.update(file.read(SAMPLE_BYTES))


@contextmanager
def _trouble_is_ours(path: Path, field: str = "") -> Iterator[None]:
    """Turn whatever the system or the safetensors library raises into a ``ModelFileError`` about ``path``."""
    try:
        yield
    except ModelFileError:
        raise
    except OSError as error:
        raise ModelFileError(path, error.strerror or str(error), field=field) from error
    except (SafetensorError, ValueError, RuntimeError) as error:  # the last two from torch, on shapes it cannot map
        raise ModelFileError(path, str(error), field=field) from error
