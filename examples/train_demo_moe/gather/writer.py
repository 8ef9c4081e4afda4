"""One file a source: documents shuffled, repetitions and foreign scripts left out, cut at a size, and a manifest."""

from __future__ import annotations

import hashlib
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gather.packages import Folders

SEPARATOR = "\n\f\n"
FOREIGN = 0.02
"""Share of characters in other scripts from which an English document is left out."""


@dataclass(frozen=True)
class Source:
    """Where one file of the corpus comes from. ``repeats``: what is left out when it was seen before in the domain or,
    for paragraphs, in the evaluation texts. ``shortest`` is in characters, ``megabytes`` in 10^6 bytes.
    """

    domain: str
    name: str
    packages: tuple[str, ...]
    licence: str
    documents: Callable[[Folders], Iterable[str]]
    megabytes: float = 9.0
    repeats: Literal["paragraphs", "documents"] = "paragraphs"
    shuffle: bool = True
    shortest: int = 300


class Writer:
    """Writes sources below ``out`` and remembers what it has written."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._seen: dict[str, set[bytes]] = defaultdict(set)
        self._manifest: list[str] = []

    def write(self, source: Source, folders: Folders) -> int:
        """Write one source; its size in bytes."""
        documents = list(source.documents(folders))
        if source.shuffle:
            random.Random(1).shuffle(documents)
        fresh = [text.encode() for text in self._fresh(source, documents)]
        kept = list(_capped(fresh, source.megabytes * 1e6))
        content = SEPARATOR.encode().join(kept)
        path = self._out / source.domain / f"{source.name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        row = (source.domain, source.name, len(content), len(kept), source.licence, " ".join(source.packages))
        self._manifest.append("\t".join(map(str, row)))
        (self._out / "MANIFEST.tsv").write_text("\n".join(self._manifest) + "\n", "utf-8")
        print(f"{source.domain:13} {source.name:26} {len(content) / 1e6:8.2f} MB {len(kept):6} documents", flush=True)
        return len(content)

    def _fresh(self, source: Source, documents: Iterable[str]) -> Iterator[str]:
        english = source.domain in ("docs", "prose")
        for text in documents:
            if not text or (english and _foreign(text) > FOREIGN):
                continue
            text = self._without_repeats(source, text).replace("\f", "").strip()
            if len(text) >= source.shortest:
                yield text

    def _without_repeats(self, source: Source, text: str) -> str:
        """The text, or what is left of it; also remembers it."""
        if source.repeats == "documents":
            return text if self._first_time(source.domain, text) else ""
        kept = []
        for paragraph in re.split(r"\n\n+", text):
            plain = re.sub(r"\W+", " ", paragraph).strip().lower()
            if plain and (len(plain) <= 30 or self._first_time(source.domain, plain, also="eval")):
                kept.append(paragraph)
        return "\n\n".join(kept)

    def _first_time(self, domain: str, text: str, also: str = "") -> bool:
        mark = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
        if mark in self._seen[domain] or (also and mark in self._seen[also]):
            return False
        self._seen[domain].add(mark)
        return True


def _foreign(text: str) -> float:
    return sum(0x250 < ord(character) < 0x2000 or ord(character) > 0x2E80 for character in text) / len(text)


def _capped(documents: Iterable[bytes], most: float) -> Iterator[bytes]:
    """Documents that fit; a longer one is passed over, except as the first."""
    size = 0
    for document in documents:
        if size and size + len(document) > most:
            continue
        size += len(document)
        yield document
