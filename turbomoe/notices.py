"""Nothing falls back in silence: one line on standard error, a count, and an error under ``--strict``."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass

from turbomoe.errors import TurbomoeError


@dataclass(frozen=True)
class Notice:
    """What was refused, shrunk or slower than asked; why; what it costs; how to avoid it.

    ``expected`` marks what is said for information and nobody could want otherwise: never an error.
    """

    what: str
    why: str
    cost: str = ""
    avoid: str = ""
    expected: bool = False

    def line(self) -> str:
        tail = "".join(f" {label}: {text}." for label, text in (("Cost", self.cost), ("To avoid", self.avoid)) if text)
        return f"note: {self.what}: {self.why}.{tail}"


class StrictError(TurbomoeError):
    """A notice raised as an error because ``--strict`` was asked for."""


class NoticeBoard:
    """Counts notices by ``what`` and prints each distinct line once."""

    def __init__(self) -> None:
        self.strict = False
        self.counts: Counter[str] = Counter()
        self._printed: set[str] = set()

    def post(self, notice: Notice) -> None:
        """Count and print ``notice``; raise ``StrictError`` in strict mode."""
        self.counts[notice.what] += 1
        if self.strict and not notice.expected:
            raise StrictError(notice.what, why=notice.why, fix=notice.avoid)
        line = notice.line()
        if line in self._printed:
            return
        self._printed.add(line)
        print(line, file=sys.stderr)


board = NoticeBoard()
