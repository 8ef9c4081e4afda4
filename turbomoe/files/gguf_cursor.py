"""Reading typed values out of a GGUF header without believing any of its numbers.

Every count and length is compared with the bytes that are really left before anything is read or allocated, so the
work and the memory of parsing are bounded by the size of the file. Value types: the GGUF specification, version 3.
"""

from __future__ import annotations

import mmap
import struct
from os import PathLike
from typing import Any, NoReturn

from turbomoe.errors import ModelFileError

# The largest header seen in the wild is some 20 MB; the cap keeps a hostile one from taking minutes and gigabytes.
HEADER_LIMIT = 128 << 20
NESTING_LIMIT = 4

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
BOOL, STRING, ARRAY = 7, 8, 9
SMALLEST = {BOOL: 1, STRING: 8, ARRAY: 12, **{kind: struct.calcsize(f"<{code}") for kind, code in SCALARS.items()}}

_LENGTH = struct.Struct("<Q")


class Cursor:
    """A position in a mapped file that only moves forward over bytes that exist. Raises ``ModelFileError`` alone."""

    def __init__(self, path: str | PathLike[str], data: mmap.mmap | bytes) -> None:
        self.path, self.data, self.offset = path, data, 0
        self.end = min(len(data), HEADER_LIMIT)

    def fail(self, reason: str, field: str, offset: int | None = None) -> NoReturn:
        """Raise for ``field`` at ``offset``, by default here."""
        raise ModelFileError(self.path, reason, field=field, offset=self.offset if offset is None else offset)

    def need(self, nbytes: int, what: str, field: str, offset: int | None = None) -> None:
        """Raise unless ``nbytes`` more bytes lie ahead; ``what`` says in words what takes them."""
        left = self.end - self.offset
        if nbytes <= left:
            return
        if self.offset + nbytes > len(self.data):
            self.fail(f"{what} needs {nbytes} bytes, but only {left} are left in the file", field, offset)
        self.fail(f"{what} needs {nbytes} bytes, past the {HEADER_LIMIT >> 20} MiB a header may take", field, offset)

    def numbers(self, code: str, count: int, field: str) -> tuple[Any, ...]:
        """``count`` little-endian numbers of the ``struct`` type ``code``."""
        nbytes = count * struct.calcsize(f"<{code}")
        self.need(nbytes, f"{count} numbers" if count > 1 else "a number", field)
        found = struct.unpack_from(f"<{count}{code}", self.data, self.offset)
        self.offset += nbytes
        return found

    def number(self, code: str, field: str) -> Any:
        """One little-endian number of the ``struct`` type ``code``."""
        return self.numbers(code, 1, field)[0]

    def count(self, smallest: int, what: str, field: str) -> int:
        """A 64-bit count of things of at least ``smallest`` bytes each that must still fit into the file."""
        at = self.offset
        count: int = self.number("Q", field)
        self.need(count * smallest, f"a count of {count} {what}", field, at)
        return count

    def name(self, limit: int, field: str) -> str:
        """A key or a tensor name: 1 to ``limit`` bytes of UTF-8 without control characters."""
        at = self.offset
        length = self.count(1, "characters", field)
        if not 1 <= length <= limit:
            self.fail(f"a name of {length} bytes; between 1 and {limit} are allowed", field, at)
        raw = self.data[self.offset : self.offset + length]
        self.offset += length
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"the name {raw!r:.80} is not UTF-8", field, at)
        if not name.isprintable():
            self.fail(f"the name {name!r:.80} holds control characters", field, at)
        return name

    def value(self, field: str) -> Any:
        """A metadata value with its type before it: int, float, bool, str, or a list of those.

        Text that is not UTF-8 keeps its bytes as lone surrogates (``surrogateescape``): a tokenizer's odd token is
        no reason to refuse a model, and ``text.encode("utf-8", "surrogateescape")`` gives the bytes back.
        """
        kind = self.kind(field)
        return self._array(field) if kind == ARRAY else self._list(kind, 1, field, 0)[0]

    def kind(self, field: str) -> int:
        """The number of a value type."""
        kind: int = self.number("I", field)
        if kind not in SMALLEST:
            self.fail(f"unknown value type {kind}; known are 0 to {max(SMALLEST)}", field, self.offset - 4)
        return kind

    def _array(self, field: str, depth: int = 0) -> list[Any]:
        if depth == NESTING_LIMIT:
            self.fail(f"arrays nested more than {NESTING_LIMIT} deep", field)
        kind = self.kind(field)
        return self._list(kind, self.count(SMALLEST[kind], "array elements", field), field, depth)

    def _list(self, kind: int, count: int, field: str, depth: int) -> list[Any]:
        """``count`` values of one type."""
        if kind == STRING:
            return self._strings(count, field)
        if kind == BOOL:
            return self._bools(count, field)
        if kind == ARRAY:
            return [self._array(f"{field}[{index}]", depth + 1) for index in range(count)]
        return list(self.numbers(SCALARS[kind], count, field))

    def _bools(self, count: int, field: str) -> list[bool]:
        at = self.offset
        raw = self.numbers("B", count, field)
        for index, byte in enumerate(raw):
            if byte > 1:
                self.fail(f"a boolean must be 0 or 1, not {byte}", field, at + index)
        return [byte == 1 for byte in raw]

    def _strings(self, count: int, field: str) -> list[str]:
        """``count`` strings. Vocabularies have 150,000 of them, so the loop calls nothing it can do without."""
        data, at, end, length_at = self.data, self.offset, self.end, _LENGTH.unpack_from
        found: list[str] = []
        for _ in range(count):
            start = at + 8
            stop = start + length_at(data, at)[0] if start <= end else start
            if stop > end:
                self.offset = at
                where = f"{field}[{len(found)}]" if count > 1 else field
                self.need(stop - at, f"a string of {stop - start} bytes with its length", where)
            found.append(data[start:stop].decode("utf-8", "surrogateescape"))
            at = stop
        self.offset = at
        return found
