"""Arrays with a JSON header in one safetensors file, checked as a whole: how profiles and traces are kept.

The file's metadata hold ``format``, ``version``, ``header`` (JSON) and ``digest``, a SHA-256 over all of them and
every array's name, type, shape and bytes. Nothing of a file is used before the digest agrees.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from turbomoe.errors import TurbomoeError
from turbomoe.files.atomic import write_bytes

Arrays = dict[str, npt.NDArray[Any]]


class RecordError(TurbomoeError):
    """A profile or trace that cannot be used: missing, damaged, of a newer version, or of another model."""


def save_arrays(
    path: str | PathLike[str], kind: str, version: int, header: Mapping[str, Any], arrays: Mapping[str, Any]
) -> None:
    """Write ``header`` and ``arrays`` to ``path``, whole or not at all. Raises ``files.atomic.WriteError``."""
    tidy = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    text = json.dumps(header, sort_keys=True)
    metadata = {"format": kind, "version": str(version), "header": text}
    write_bytes(path, save(tidy, metadata | {"digest": _digest(metadata, tidy)}))


def load_arrays(path: str | PathLike[str], kind: str, version: int, largest: int) -> tuple[dict[str, Any], Arrays]:
    """Header and arrays of a file of ``kind``. Raises ``RecordError`` with the reason; ``largest`` counts bytes."""
    name, what = fspath(path), kind.replace("turbomoe-", "").replace("-", " ")
    try:
        _check_size(Path(name), largest)
        metadata, arrays = _read(name, kind, version)
        header = json.loads(metadata["header"])
    except RecordError as error:
        raise RecordError(f"Cannot use {name} as {what}: {error.what}", fix=error.fix) from error
    except OSError as error:
        raise RecordError(f"Cannot read the {what} {name}: {error.strerror or error}") from error
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RecordError(f"Cannot use {name} as {what}: it is damaged ({_short(error)})") from error
    if not isinstance(header, dict):
        raise RecordError(f"Cannot use {name} as {what}: its header is not an object")
    return header, arrays


def _check_size(path: Path, largest: int) -> None:
    if not path.is_file():  # reading a pipe would wait forever
        raise RecordError("it is not there" if not path.exists() else "it is not a regular file")
    if path.stat().st_size > largest:
        raise RecordError(f"its {path.stat().st_size} bytes are more than {largest}")


def _read(name: str, kind: str, version: int) -> tuple[dict[str, str], Arrays]:
    with safe_open(name, framework="numpy") as file:
        metadata = file.metadata() or {}
        _check_kind(metadata, kind, version)
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
    signed = {key: value for key, value in metadata.items() if key != "digest"}
    if metadata.get("digest") != _digest(signed, arrays):
        raise RecordError("it is damaged (its contents do not match their checksum)")
    return metadata, arrays


def _check_kind(metadata: Mapping[str, str], kind: str, version: int) -> None:
    if metadata.get("format") != kind:
        raise RecordError("it is another kind of file")
    found = metadata.get("version", "")
    if found != str(version):
        fix = "Use the turbomoe that wrote it, or make it again"
        raise RecordError(f"its version is {found[:20]!r}, and this turbomoe reads {version}", fix=fix)


def _digest(metadata: Mapping[str, str], arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    hasher = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(arrays):
        array = arrays[name]
        hasher.update(f"\n{name} {array.dtype.str} {array.shape}\n".encode())
        hasher.update(np.ascontiguousarray(array).data)
    return hasher.hexdigest()


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
