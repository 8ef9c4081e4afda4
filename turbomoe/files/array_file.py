"""Arrays with a JSON header in one safetensors file, checked as a whole: how profiles, traces and sessions are kept.

The file's metadata hold ``format``, ``version``, ``header`` (JSON) and ``digest``, a SHA-256 over all of them and
every array's name, type, shape and bytes. Nothing of a file is used before the digest agrees. Both ways go array by
array: a session of a gigabyte takes no second gigabyte of memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from turbomoe.errors import TurbomoeError
from turbomoe.files.atomic import write_atomically

Array = npt.NDArray[Any]
Arrays = dict[str, Array]
LARGEST_HEAD = 100_000_000  # safetensors' own limit
# What safetensors calls numpy's types; types that numpy lacks are stored as bits by whoever has them.
TYPE_NAMES = {
    "|b1": "BOOL", "|u1": "U8", "|i1": "I8", "<u2": "U16", "<i2": "I16", "<u4": "U32", "<i4": "I32", "<u8": "U64",
    "<i8": "I64", "<f2": "F16", "<f4": "F32", "<f8": "F64",
}  # fmt: skip


class RecordError(TurbomoeError):
    """A profile, trace or session that cannot be used: missing, damaged, of a newer version, or of another model."""


@dataclass(frozen=True)
class LateArray:
    """An array that is made when its turn comes to be hashed and again to be written, and dropped in between."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    read: Callable[[], Array]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class ArrayFile:
    """An open file whose digest agrees. ``read`` copies one array out of it; valid inside ``open_arrays`` only.

    ``table`` has the type (a value of ``TYPE_NAMES``) and the shape of each array.
    """

    header: dict[str, Any]
    table: dict[str, tuple[str, tuple[int, ...]]]
    read: Callable[[str], Array]


def save_arrays(
    path: str | PathLike[str], kind: str, version: int, header: Mapping[str, Any], arrays: Mapping[str, Any],
    private: bool = False,
) -> None:  # fmt: skip
    """Write ``header`` and ``arrays`` (numpy's, or late ones) to ``path``, whole or not at all.

    A new file that is ``private`` can be read by its owner alone; a file that is replaced keeps its permissions.
    Raises ``files.atomic.WriteError``.
    """
    late = {name: _late(array) for name, array in arrays.items()}
    metadata = {"format": kind, "version": str(version), "header": json.dumps(header, sort_keys=True)}
    signed = metadata | {"digest": _digest(metadata, late, lambda name: late[name].read())}

    def write(file: BinaryIO) -> None:
        if private:
            os.fchmod(file.fileno(), 0o600)
        _write(file, signed, late)

    write_atomically(path, write)


def load_arrays(path: str | PathLike[str], kind: str, version: int, largest: int) -> tuple[dict[str, Any], Arrays]:
    """Header and all arrays of a file of ``kind``, as ``open_arrays`` would give them."""
    with open_arrays(path, kind, version, largest) as file:
        return file.header, {name: file.read(name) for name in sorted(file.table)}


@contextmanager
def open_arrays(path: str | PathLike[str], kind: str, version: int, largest: int) -> Iterator[ArrayFile]:
    """Open a file of ``kind``, check it whole, and hand it out for reading array by array.

    Raises ``RecordError`` with the reason; ``largest`` counts bytes.
    """
    name, what = fspath(path), kind.replace("turbomoe-", "").replace("-", " ")
    try:
        _check_size(Path(name), largest)
        if not _has_head(Path(name)):
            raise RecordError("it is another kind of file")
        opened = safe_open(name, framework="numpy")
        metadata = _check(opened, kind, version)
        header = json.loads(metadata["header"])
    except RecordError as error:
        raise RecordError(f"Cannot use {name} as {what}: {error.what}", fix=error.fix) from error
    except OSError as error:
        raise RecordError(f"Cannot read the {what} {name}: {error.strerror or error}") from error
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RecordError(f"Cannot use {name} as {what}: it is damaged ({_short(error)})") from error
    if not isinstance(header, dict):
        raise RecordError(f"Cannot use {name} as {what}: its header is not an object")
    with opened as file:
        yield ArrayFile(header, {name: _entry(file.get_slice(name)) for name in file.keys()}, file.get_tensor)  # noqa: SIM118


def kind_of(path: str | PathLike[str]) -> str:
    """The kind that the head of a file claims, also of one that is cut or damaged further on; "" for other files."""
    return str(_claims(path).get("format", ""))


def claimed_header(path: str | PathLike[str]) -> dict[str, Any]:
    """The header that a file claims, unchecked (``open_arrays`` checks): for what must be known early. Else empty."""
    with suppress(ValueError, TypeError, RecursionError):
        header = json.loads(_claims(path).get("header", "{}"))
        return header if isinstance(header, dict) else {}
    return {}


def _has_head(path: Path) -> bool:
    """Whether the file begins as all of ours do, even if it is cut or damaged further on."""
    with open(path, "rb") as file:
        return len(file.read(8)) < 8 or file.read(1) == b"{"


def _claims(path: str | PathLike[str]) -> dict[str, Any]:
    if not Path(path).is_file():  # opening a pipe would wait forever
        return {}
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError), open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size <= LARGEST_HEAD:
            found = json.loads(file.read(size))["__metadata__"]
            return found if isinstance(found, dict) else {}
    return {}


def _entry(array: Any) -> tuple[str, tuple[int, ...]]:
    return array.get_dtype(), tuple(array.get_shape())


def _late(array: Any) -> LateArray:
    if isinstance(array, LateArray):
        return array
    tidy = np.ascontiguousarray(array)
    return LateArray(tidy.dtype, tidy.shape, lambda: tidy)


def _write(file: BinaryIO, metadata: Mapping[str, str], arrays: Mapping[str, LateArray]) -> None:
    """The safetensors layout: length, JSON, bytes; arrays with wide elements first, so that all are aligned."""
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name in order:
        array = arrays[name]
        span = [at, at := at + array.nbytes]
        table[name] = {"dtype": TYPE_NAMES[array.dtype.str], "shape": list(array.shape), "data_offsets": span}
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        file.write(_bytes(arrays[name].read()))


def _check_size(path: Path, largest: int) -> None:
    if not path.is_file():  # reading a pipe would wait forever
        raise RecordError("it is not there" if not path.exists() else "it is not a regular file")
    if path.stat().st_size > largest:
        raise RecordError(f"its {path.stat().st_size} bytes are more than {largest}")


def _check(file: Any, kind: str, version: int) -> dict[str, str]:
    """The metadata of an open file of this kind and version whose digest agrees."""
    metadata: dict[str, str] = file.metadata() or {}
    _check_kind(metadata, kind, version)
    signed = {key: value for key, value in metadata.items() if key != "digest"}
    if metadata.get("digest") != _digest(signed, file.keys(), file.get_tensor):
        raise RecordError("it is damaged (its contents do not match their checksum)")
    return metadata


def _check_kind(metadata: Mapping[str, str], kind: str, version: int) -> None:
    if metadata.get("format") != kind:
        raise RecordError("it is another kind of file")
    found = metadata.get("version", "")
    if found != str(version):
        fix = "Use the turbomoe that wrote it, or make it again"
        raise RecordError(f"its version is {found[:20]!r}, and this turbomoe reads {version}", fix=fix)


def _digest(metadata: Mapping[str, str], names: Any, read: Callable[[str], Array]) -> str:
    hasher = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(names):
        array = read(name)
        hasher.update(f"\n{name} {array.dtype.str} {array.shape}\n".encode())
        hasher.update(_bytes(array))
    return hasher.hexdigest()


def _bytes(array: Array) -> memoryview:
    """The bytes of an array, without a copy where it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
