"""Model files: formats, names, tokenizers, references. ``open_model`` is the factory; formats load when needed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from turbomoe.errors import ModelFileError

if TYPE_CHECKING:
    from turbomoe.files.base import ModelSource

GGUF_MAGIC = b"GGUF"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def open_model(path: str | os.PathLike[str]) -> ModelSource:
    """Open a model by its content: a GGUF file (any shard of a split series) or a safetensors folder.

    Raises ``ModelFileError`` for anything else, with the reason; ``reference.resolve`` turns names into paths.
    """
    path = Path(path)
    if os.path.isdir(path):
        from turbomoe.files.safetensors import SafetensorsFolder

        return SafetensorsFolder.open(path)
    if _first_bytes(path) == GGUF_MAGIC:
        from turbomoe.files.gguf import GgufFile

        return GgufFile.open(path)
    raise ModelFileError(path, _why_not(path))


def _first_bytes(path: Path) -> bytes:
    if os.path.exists(path) and not os.path.isfile(path):
        raise ModelFileError(path, "it is neither a file nor a folder")
    try:
        with open(path, "rb") as file:
            return file.read(len(GGUF_MAGIC))
    except (OSError, ValueError) as error:
        raise ModelFileError(path, getattr(error, "strerror", None) or str(error)) from error


def _why_not(path: Path) -> str:
    if path.suffix == ".safetensors":
        return "a safetensors file alone is not a model: give the folder that also holds its config.json"
    if path.suffix in PICKLE_SUFFIXES:
        return "pickle files can run code when read, so turbomoe never reads them: use GGUF or safetensors"
    return "it does not start with the GGUF magic, and a safetensors model is a folder"
