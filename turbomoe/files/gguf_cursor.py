"""Reading typed values out of a GGUF header without believing any of its numbers.

Every count and length is compared with the bytes that are really left before anything is read or allocated, and what
costs time or memory beyond its bytes has a limit of its own: whatever the file, parsing its header takes less than a
second and 64 MiB. Value types: the GGUF specification, version 3.
"""

from __future__ import annotations

import mmap
import struct
from array import array
from os import PathLike
from typing import Any, NoReturn

import numpy as np

from turbomoe.errors import ModelFileError
from turbomoe.files.gguf_array import Numbers, Strings

# The largest headers seen in the wild have 20 MB, 800,000 strings in arrays and 50 KB of text outside of them.
HEADER_LIMIT = 64 << 20
STRINGS_LIMIT = 1 << 20  # elements of all arrays of strings together
TEXT_LIMIT = 6 << 20  # bytes of names and of strings outside arrays: a decoded text takes up to four times its bytes
ARRAYS_LIMIT = 4096  # arrays within arrays, all together
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
        self._arrays = self._strings = self._text = 0  # so far, against the limits

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

    def limit(self, count: int, most: int, what: str, field: str) -> int:
        """``count``, if that is at most ``most``."""
        if count > most:
            self.fail(f"{count} {what}; at most {most} are allowed", field)
        return count

    def text(self, length: int, field: str) -> bytes:
        """The ``length`` bytes ahead, which are known to exist, against the limit on text."""
        what = "bytes of names and strings outside arrays"
        self._text = self.limit(self._text + length, TEXT_LIMIT, what, field)
        self.offset += length
        return self.data[self.offset - length : self.offset]

    def name(self, limit: int, field: str) -> str:
        """A key or a tensor name: 1 to ``limit`` bytes of UTF-8 without control characters."""
        at = self.offset
        length = self.count(1, "characters", field)
        if not 1 <= length <= limit:
            self.fail(f"a name of {length} bytes; between 1 and {limit} are allowed", field, at)
        raw = self.text(length, field)
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"the name {raw!r:.80} is not UTF-8", field, at)
        if not name.isprintable():
            self.fail(f"the name {name!r:.80} holds control characters", field, at)
        return name

    def value(self, field: str) -> Any:
        """A metadata value with its type before it: int, float, bool, str, or a sequence of those.

        Arrays are ``Numbers`` and ``Strings``, which read the file when asked, and lists of arrays. Text that is not
        UTF-8 keeps its bytes as lone surrogates (``surrogateescape``): a tokenizer's odd token is no reason to refuse
        a model, and ``text.encode("utf-8", "surrogateescape")`` gives the bytes back.
        """
        kind = self.kind(field)
        if kind == ARRAY:
            return self._array(field)
        return self._string(field) if kind == STRING else self._numbers(kind, 1, field)[0]

    def kind(self, field: str) -> int:
        """The number of a value type."""
        kind: int = self.number("I", field)
        if kind not in SMALLEST:
            self.fail(f"unknown value type {kind}; known are 0 to {max(SMALLEST)}", field, self.offset - 4)
        return kind

    def _array(self, field: str, depth: int = 0) -> Numbers | Strings | list[Any]:
        if depth == NESTING_LIMIT:
            self.fail(f"arrays nested more than {NESTING_LIMIT} deep", field)
        kind = self.kind(field)
        count = self.count(SMALLEST[kind], "array elements", field)
        if kind == STRING:
            return self._string_array(count, field)
        if kind == ARRAY:
            self._arrays = self.limit(self._arrays + count, ARRAYS_LIMIT, "arrays within arrays", field)
            return [self._array(f"{field}[{index}]", depth + 1) for index in range(count)]
        return self._numbers(kind, count, field)

    def _numbers(self, kind: int, count: int, field: str) -> Numbers:
        self.need(count * SMALLEST[kind], f"{count} numbers" if count > 1 else "a number", field)
        view = np.frombuffer(self.data, f"<{SCALARS.get(kind, 'B')}", count, self.offset)
        if kind == BOOL:
            view = self._checked_bools(view, field)
        self.offset += view.nbytes
        return Numbers(view)

    def _checked_bools(self, view: Any, field: str) -> Any:
        if len(view) and view.max() > 1:
            at = int(view.argmax())
            self.fail(f"a boolean must be 0 or 1, not {view[at]}", field, self.offset + at)
        return view.view(np.bool_)

    def _string(self, field: str) -> str:
        length = self.number("Q", field)
        self.offset -= 8  # so that a refusal points to the length and counts it
        self.need(8 + length, f"a string of {length} bytes with its length", field)
        self.offset += 8
        return self.text(length, field).decode("utf-8", "surrogateescape")

    def _string_array(self, count: int, field: str) -> Strings:
        """``count`` strings. Vocabularies have 250,000 of them, so the loop calls nothing it can do without."""
        self._strings = self.limit(self._strings + count, STRINGS_LIMIT, "strings in arrays", field)
        data, at, end, length_at = self.data, self.offset, self.end, _LENGTH.unpack_from
        starts = array("I", [at + 8])  # the limit of a header fits into 32 bits
        for index in range(count):
            start = at + 8
            stop = start + length_at(data, at)[0] if start <= end else start
            if stop > end:
                self.offset = at
                what = f"a string of {stop - start} bytes with its length"
                self.need(stop - at, what, f"{field}[{index}]" if count > 1 else field)
            starts.append(stop + 8)
            at = stop
        self.offset = at
        return Strings(data, starts)
