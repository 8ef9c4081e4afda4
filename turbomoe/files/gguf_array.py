"""Arrays of a GGUF header as sequences that leave their elements in the file until somebody asks for them.

A list of Python numbers takes eight to thirty times the bytes of the file and seconds to build; most arrays are never
read. Both classes keep the mapping alive and compare equal to lists of the same elements.
"""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

_SHOWN = 16  # elements in a repr, which goes into messages


class _Compact(Sequence[Any]):
    """What both have in common: equality with lists, and a repr that stays short."""

    def tolist(self) -> list[Any]:
        """All elements as a fresh list."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tolist())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and self.tolist() == list(other)

    __hash__ = None  # type: ignore[assignment]  # like a list

    def __repr__(self) -> str:
        shown = repr([self[index] for index in range(min(len(self), _SHOWN))])
        return shown if len(self) <= _SHOWN else f"{shown[:-1]}, ... {len(self)} in all]"


class Numbers(_Compact):
    """Numbers or truth values of one type: ``view`` is a numpy array over the file. Elements are Python's own."""

    def __init__(self, view: npt.NDArray[Any]) -> None:
        self._view = view

    def __len__(self) -> int:
        return len(self._view)

    def __getitem__(self, index: Any) -> Any:
        return self._view[index].tolist()

    def tolist(self) -> list[Any]:
        found: list[Any] = self._view.tolist()
        return found

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Numbers) and other._view.dtype == self._view.dtype:
            # Bytes, because a not-a-number equals itself when two files are compared; in place, without a copy.
            return bool(self._view.view(np.uint8).data == other._view.view(np.uint8).data)
        return super().__eq__(other)

    __hash__ = None


class Strings(_Compact):
    """Strings one behind the other, each after its eight bytes of length.

    ``starts`` holds the offset of every text and, last, of a text that would follow. Bytes that are not UTF-8 become
    lone surrogates (``surrogateescape``).
    """

    def __init__(self, data: mmap.mmap | bytes, starts: array[int]) -> None:
        self._data, self._starts = data, starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        return self._data[self._starts[at] : self._starts[at + 1] - 8].decode("utf-8", "surrogateescape")

    def tolist(self) -> list[str]:
        return list(self)

    def __iter__(self) -> Iterator[str]:
        data = self._data
        for start, following in pairwise(self._starts):
            yield data[start : following - 8].decode("utf-8", "surrogateescape")
