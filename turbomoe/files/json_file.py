"""JSON and text from strangers: read whole only below a size limit, UTF-8 or refused, one error type."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from turbomoe.errors import ModelFileError

# The largest tokenizer.json in use (a vocabulary of 262,144 with its merges) is about 33 MB.
MAX_BYTES = 128 << 20


def read_text(path: Path, limit: int = MAX_BYTES) -> str:
    """The text of a UTF-8 file of at most ``limit`` bytes; ``ModelFileError`` for anything else."""
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise ModelFileError(path, "it is not a regular file")
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ModelFileError(path, error.strerror or str(error)) from error
    if len(data) > limit:
        raise ModelFileError(path, f"it is larger than {limit} bytes, which no file of this kind needs")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ModelFileError(path, "it is not UTF-8 text", offset=error.start) from error


def read_json_object(path: Path, limit: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in a file; ``ModelFileError`` when it is not JSON, not an object, too deep or too large."""
    text = read_text(path, limit)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ModelFileError(path, f"it is not JSON: {error}") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        raise ModelFileError(path, f"its JSON cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelFileError(path, "it must hold a JSON object")
    return value


class JsonFolder(Mapping[str, Any]):
    """The given files of a folder by stem, each read when first asked for: JSON as objects, other text as it is.

    Parsing a large vocabulary takes a second, and whoever wants weights only should not pay for it.
    """

    def __init__(self, folder: Path, names: tuple[str, ...]) -> None:
        self._paths = {Path(name).stem: folder / name for name in names if (folder / name).is_file()}
        self._read: dict[str, Any] = {}

    def __getitem__(self, stem: str) -> Any:
        if stem not in self._read:
            path = self._paths[stem]
            self._read[stem] = read_json_object(path) if path.suffix == ".json" else read_text(path)
        return self._read[stem]

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)
