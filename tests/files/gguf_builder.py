"""Writes GGUF files byte by byte, so that a test can lie about any number in them.

``Gguf`` describes a file; every count, offset and length is computed unless the description says otherwise.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}


def number(kind: int, value: Any) -> bytes:
    return struct.pack(f"<{CODES[kind]}", value)


def text(value: str | bytes, length: int | None = None) -> bytes:
    """A string with its length in front, or with another length."""
    raw = value.encode() if isinstance(value, str) else value
    return number(U64, len(raw) if length is None else length) + raw


def encode(kind: int, value: Any) -> bytes:
    """A value of GGUF type ``kind`` without the type; an array is a pair (element type, list)."""
    if kind == STRING:
        return text(value)
    if kind == ARRAY:
        return array(*value)
    return number(kind, value)


def array(kind: int, values: list[Any], count: int | None = None) -> bytes:
    """An array's element type, count (or another count) and elements."""
    body = b"".join(encode(kind, value) for value in values)
    return number(U32, kind) + number(U64, len(values) if count is None else count) + body


def key(name: str | bytes, kind: int, value: Any) -> bytes:
    """A key-value; ``value`` as bytes stands for itself unless the kind is a string."""
    body = value if isinstance(value, bytes) and kind != STRING else encode(kind, value)
    return text(name) + number(U32, kind) + body


@dataclass(frozen=True)
class Tensor:
    """A tensor of ``data`` bytes; ``dims`` in the order of the file. ``offset`` None: the next aligned place."""

    name: str | bytes
    dims: tuple[int, ...]
    type_id: int
    data: bytes
    offset: int | None = None
    dimensions: int | None = None

    def entry(self, offset: int) -> bytes:
        count = len(self.dims) if self.dimensions is None else self.dimensions
        dims = b"".join(number(U64, dim) for dim in self.dims)
        return text(self.name) + number(U32, count) + dims + number(U32, self.type_id) + number(U64, offset)


@dataclass(frozen=True)
class Gguf:
    """A whole file. ``keys`` are ready bytes (see ``key``); ``cut`` drops bytes from the end."""

    keys: tuple[bytes, ...] = ()
    tensors: tuple[Tensor, ...] = ()
    magic: bytes = b"GGUF"
    version: bytes = number(U32, 3)
    key_count: int | None = None
    tensor_count: int | None = None
    alignment: int = 32
    cut: int = 0

    def header(self) -> bytes:
        """Everything up to the tensors' bytes, padding excluded."""
        tensor_count = len(self.tensors) if self.tensor_count is None else self.tensor_count
        key_count = len(self.keys) if self.key_count is None else self.key_count
        start = self.magic + self.version + number(U64, tensor_count) + number(U64, key_count)
        return start + b"".join(self.keys) + b"".join(map(Tensor.entry, self.tensors, self._offsets()))

    def build(self) -> bytes:
        """The file's bytes. A tensor with an offset of its own is still written in its turn."""
        raw = bytearray(self._padded(self.header()))
        for tensor in self.tensors:
            raw += self._padded(tensor.data)
        return bytes(raw[: len(raw) - self.cut])

    def write(self, path: Path) -> Path:
        path.write_bytes(self.build())
        return path

    def but(self, **changes: Any) -> Gguf:
        """The same file with some fields changed."""
        return replace(self, **changes)

    def _padded(self, raw: bytes) -> bytes:
        return raw + bytes(-len(raw) % self.alignment)

    def _offsets(self) -> list[int]:
        offsets, at = [], 0
        for tensor in self.tensors:
            offsets.append(at if tensor.offset is None else tensor.offset)
            at += len(self._padded(tensor.data))
        return offsets


@dataclass
class Sample:
    """What a plausible small model file holds: keys of every type and three tensors. ``gguf`` describes it."""

    vocabulary: list[str] = field(default_factory=lambda: ["<s>", "a", "b", "ab", "Grüße"])

    @property
    def gguf(self) -> Gguf:
        keys = (
            key("general.architecture", STRING, "llama"),
            key("general.alignment", U32, 32),
            key("llama.block_count", U32, 2),
            key("llama.rope.freq_base", F32, 10000.0),
            key("llama.flag", BOOL, True),
            key("llama.big", U64, 1 << 63),
            key("llama.minus", I64, -5),
            key("tokenizer.ggml.tokens", ARRAY, (STRING, self.vocabulary)),
            key("tokenizer.ggml.token_type", ARRAY, (I32, [1] * len(self.vocabulary))),
            key("nested", ARRAY, (ARRAY, [(U8, [1, 2]), (STRING, ["x"])])),
        )
        tensors = (
            Tensor("token_embd.weight", (8, 5), 0, bytes(range(160))),
            Tensor("blk.0.attn_q.weight", (32, 3), 8, bytes(range(102))),
            Tensor("output_norm.weight", (8,), 1, bytes(range(16))),
        )
        return Gguf(keys, tensors)


def vocabulary_file(tokens: int, merges: int) -> Gguf:
    """A file with a large vocabulary: token texts, types and merges of natural lengths, no tensors."""
    names = [f"Ġtoken{index * 7919 % 1000003}" for index in range(tokens)]
    pairs = [f"Ġm{index % 977} erge{index}" for index in range(merges)]
    return Gguf(
        (
            key("general.architecture", STRING, "qwen2"),
            key("tokenizer.ggml.tokens", ARRAY, (STRING, names)),
            key("tokenizer.ggml.token_type", ARRAY, (I32, [1] * tokens)),
            key("tokenizer.ggml.merges", ARRAY, (STRING, pairs)),
        )
    )
