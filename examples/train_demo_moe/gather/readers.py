"""Folders of one kind of file as documents: pages, texts, source code, and the texts of two games."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator

from gather.markup import html_text
from gather.text import files, read, tidy

LONGEST_LINE = 1000
QUOTED = re.compile(r"^\s*(?:description|dialog|conversation|spaceport|briefing|on \w+)?\s*`([^`]+)`")
DESCRIBED = re.compile(r'^\s*(?:description|spaceport|dialog)\s+"([^"]+)"')


def texts(root: str, *patterns: str, through: Callable[[str], str] = tidy) -> Iterator[str]:
    """Each file that matches, made plain by ``through``."""
    for path in files(root, *patterns):
        yield through(read(path))


def pages(root: str, *patterns: str, skip: str = "") -> Iterator[str]:
    """HTML pages whose path does not hold ``skip``."""
    for path in files(root, *patterns):
        if not skip or skip not in path:
            yield html_text(read(path))


def code(root: str, *patterns: str, skip: str = "", largest: float = 300_000) -> Iterator[str]:
    """Source files of usual size and line length whose path does not match ``skip``."""
    for path in files(root, *patterns):
        if (skip and re.search(skip, path)) or not 300 < os.path.getsize(path) < largest:
            continue
        text = read(path)
        lines = text.split("\n")
        if len(lines) > 5 and max(map(len, lines)) <= LONGEST_LINE:
            yield text.replace("\r\n", "\n").replace("\f", "").strip()


def fortunes(root: str) -> Iterator[str]:
    """Sayings, without pictures made of characters and the files marked offensive."""
    for path in files(root, "usr/share/games/fortunes/**/*"):
        if path.endswith((".dat", ".u8")) or re.search(r"ascii-?art|/art$|/off|-off", path):
            continue
        text = re.sub(r"\x1b\[[0-9;]*m|[a-zA-Z_]\x08", "", read(path))
        yield tidy(re.sub(r"(?m)^%{1,2}[ \t]*$", "", text))


def endless_sky(root: str) -> Iterator[str]:
    """Descriptions and dialogues of the game Endless Sky."""
    for path in files(root, "usr/share/games/endless-sky/data/*.txt"):
        found = (QUOTED.match(line) or DESCRIBED.match(line) for line in read(path).split("\n"))
        yield tidy("\n\n".join(match[1].strip() for match in found if match))


def wesnoth(roots: list[str], translated: dict[str, str] | None = None) -> Iterator[str]:
    """Stories and descriptions of Battle for Wesnoth, in English or as a catalogue translates them."""
    for root in roots:
        for path in files(root, "**/campaigns/**/*.cfg", "**/core/units/**/*.cfg"):
            found = (match[1].replace('""', '"') for match in re.finditer(r'_\s*"((?:[^"]|"")*)"', read(path)))
            spoken = found if translated is None else (translated.get(text, "") for text in found)
            yield tidy("\n\n".join(re.sub(r"<[^>]+>", "", text) for text in spoken if len(text) >= 60))


def mostly(language: str, documents: Iterable[str]) -> Iterator[str]:
    """Each document without the paragraphs that were left in English."""
    keep = _cyrillic if language == "ru" else _not_english
    for text in documents:
        yield "\n\n".join(paragraph for paragraph in re.split(r"\n\n+", text) if keep(paragraph))


def _cyrillic(paragraph: str) -> bool:
    letters = max(1, sum(character.isalpha() for character in paragraph))
    return len(paragraph) < 60 or sum(ord(character) > 0x250 for character in paragraph) > 0.15 * letters


def _not_english(paragraph: str) -> bool:
    common = len(re.findall(r"\b(the|and|of|to|is|that|with)\b", paragraph))
    return len(paragraph) < 80 or common < 0.08 * len(paragraph.split())
