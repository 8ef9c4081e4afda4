"""The header of one GGUF file: metadata and tensor table, each tensor's range proven to lie inside the file.

Layout (GGUF specification, versions 2 and 3): magic, version, tensor count, key count; the key-values; one entry a
tensor (name, dimensions fastest axis first, type, offset); padding to the alignment; then the tensors' bytes.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from itertools import pairwise
from os import PathLike
from typing import Any

from turbomoe.errors import ModelError
from turbomoe.files.base import TensorInfo
from turbomoe.files.blocks import FORMATS, packed_bytes
from turbomoe.files.gguf_cursor import Cursor

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT_KEY = "general.alignment"
DEFAULT_ALIGNMENT, ALIGNMENT_LIMIT = 32, 1 << 24
KEY_LIMIT, TENSOR_NAME_LIMIT, DIMENSIONS_LIMIT = 65535, 64, 4
# Real files have some fifty keys and, with the experts of a layer in one tensor, a thousand tensors.
KEYS_LIMIT, TENSORS_LIMIT = 1 << 12, 1 << 14

# Least bytes: a key (length, one character, type, one byte); a tensor (length, one character, one axis, type, offset).
KEY_BYTES, TENSOR_BYTES = 14, 33

SUPPORTED = {block.type_id: name for name, block in FORMATS.items()}
# Types that exist but have no decoder here, so that the refusal can call them by name.
OTHER_TYPES = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A tensor and where its bytes lie: ``start`` counts from the beginning of the file; ``at`` is its table entry."""

    info: TensorInfo
    start: int
    at: int

    @property
    def stop(self) -> int:
        return self.start + self.info.nbytes


@dataclass(frozen=True)
class Header:
    """A checked header. ``data_start`` is its length in bytes, padding included."""

    metadata: dict[str, Any]
    tensors: list[Entry]
    data_start: int


def read_header(path: str | PathLike[str], data: mmap.mmap | bytes) -> Header:
    """Parse and check the header of ``data``, the whole file. Raises ``ModelFileError`` and nothing else."""
    cursor = Cursor(path, data)
    _check_start(cursor)
    tensor_count = cursor.count(TENSOR_BYTES, "tensors", "tensor count")
    key_count = cursor.count(KEY_BYTES, "metadata keys", "metadata count")
    cursor.limit(tensor_count, TENSORS_LIMIT, "tensors", "tensor count")
    cursor.limit(key_count, KEYS_LIMIT, "metadata keys", "metadata count")
    metadata = _read_metadata(cursor, key_count)
    alignment = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    table = [_read_entry(cursor, alignment) for _ in range(tensor_count)]
    data_start = -(-cursor.offset // alignment) * alignment
    entries = [Entry(entry.info, data_start + entry.start, entry.at) for entry in table]
    _check_ranges(cursor, entries)
    return Header(metadata, entries, data_start)


def _check_start(cursor: Cursor) -> None:
    if len(cursor.data) < 24:
        cursor.fail(f"{len(cursor.data)} bytes are too few for a GGUF header, which takes at least 24", "header")
    if cursor.data[:4] != MAGIC:
        cursor.fail(f"it starts with {cursor.data[:4]!r}, not with the GGUF magic", "magic")
    cursor.offset = 4
    version = cursor.number("I", "version")
    if version in VERSIONS:
        return
    if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, *VERSIONS):
        cursor.fail("the file is big-endian; only little-endian GGUF is supported", "version", 4)
    cursor.fail(f"GGUF version {version} is not supported; versions 2 and 3 are", "version", 4)


def _read_metadata(cursor: Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for index in range(count):
        at = cursor.offset
        key = cursor.name(KEY_LIMIT, f"metadata key {index}")
        if key in metadata:
            cursor.fail("this key occurs twice", f"metadata {key!r:.80}", at)
        metadata[key] = cursor.value(f"metadata {key!r:.80}")
        if key == ALIGNMENT_KEY:
            _check_alignment(cursor, metadata[key], at)
    return metadata


def _check_alignment(cursor: Cursor, alignment: Any, at: int) -> None:
    # type() because True is an int to isinstance; a power of two has one bit set.
    if type(alignment) is int and 8 <= alignment <= ALIGNMENT_LIMIT and alignment & (alignment - 1) == 0:
        return
    reason = f"the alignment must be a power of two from 8 to {ALIGNMENT_LIMIT}, not {alignment!r:.80}"
    cursor.fail(reason, f"metadata {ALIGNMENT_KEY!r}", at)


def _read_entry(cursor: Cursor, alignment: int) -> Entry:
    """One line of the tensor table; ``start`` is still relative to the end of the header."""
    at = cursor.offset
    name = cursor.name(TENSOR_NAME_LIMIT, "tensor name")
    field = f"tensor {name!r:.80}"
    shape = _read_shape(cursor, field)
    format = _format(cursor, field)
    start_at = cursor.offset
    start = cursor.number("Q", field)
    if start % alignment:
        cursor.fail(f"its offset {start} is not a multiple of the alignment {alignment}", field, start_at)
    try:
        nbytes = packed_bytes(format, shape)
    except ModelError as error:
        cursor.fail(str(error), field, at)
    return Entry(TensorInfo(name, shape, format, nbytes), start, at)


def _read_shape(cursor: Cursor, field: str) -> tuple[int, ...]:
    at = cursor.offset
    dimensions = cursor.number("I", field)
    if not 1 <= dimensions <= DIMENSIONS_LIMIT:
        cursor.fail(f"{dimensions} dimensions; 1 to {DIMENSIONS_LIMIT} are allowed", field, at)
    shape = cursor.numbers("Q", dimensions, field)[::-1]
    if min(shape) < 1:
        cursor.fail(f"its shape {shape} has an empty axis", field, at)
    return shape


def _format(cursor: Cursor, field: str) -> str:
    type_id = cursor.number("I", field)
    if type_id not in SUPPORTED:
        called = f"block type {OTHER_TYPES[type_id]}" if type_id in OTHER_TYPES else f"unknown block type {type_id}"
        cursor.fail(f"{called} is not supported; supported are {', '.join(FORMATS)}", field, cursor.offset - 4)
    return SUPPORTED[type_id]


def _check_ranges(cursor: Cursor, entries: list[Entry]) -> None:
    """No name twice, no byte outside the file, no byte in two tensors."""
    size, seen = len(cursor.data), set[str]()
    for entry in entries:
        field = f"tensor {entry.info.name!r:.80}"
        if entry.info.name in seen:
            cursor.fail("this tensor occurs twice", field, entry.at)
        if entry.stop > size:
            reason = f"its bytes {entry.start} to {entry.stop} reach past the end of the file, which has {size}"
            cursor.fail(f"{reason}: the file is truncated or damaged", field, entry.at)
        seen.add(entry.info.name)
    for before, after in pairwise(sorted(entries, key=lambda entry: entry.start)):
        if after.start < before.stop:
            cursor.fail(f"its bytes overlap those of {before.info.name!r}", f"tensor {after.info.name!r}", after.at)
