"""Files that hold many texts: R's lazy-load data, SWORD modules, gettext catalogues, Wikipedia dumps, archives."""

from __future__ import annotations

import bz2
import html
import lzma
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator

from gather.text import files, one_file, read, tidy

R_STRING = re.compile(rb"\x00[\x00-\x0f][\x00-\xff]\x09", re.S)
LONGEST_STRING = 4000


def r_strings(path: str) -> Iterator[list[str]]:
    """The character vectors of an R ``.rdb`` file, one list for each stored object."""
    with open(path, "rb") as file:
        data = file.read()
    at = 0
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        raw, used = _decompress(data[at + 4 :])
        if len(raw) != size:
            raise ValueError(f"{path}: an object of {len(raw)} bytes where {size} were announced")
        at += 4 + used
        yield _strings(raw)


def _decompress(data: bytes) -> tuple[bytes, int]:
    """(contents, bytes used) of one compressed object, its letter for the method included."""
    method = data[:1]
    skip = 1 if method in (b"2", b"Z") else 0
    if method == b"2":
        unpack: bz2.BZ2Decompressor | lzma.LZMADecompressor | zlib._Decompress = bz2.BZ2Decompressor()
    elif method == b"Z":
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
        unpack = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=filters)
    else:
        unpack = zlib.decompressobj()
    raw = unpack.decompress(data[skip:])
    return raw, len(data) - len(unpack.unused_data)


def _strings(raw: bytes) -> list[str]:
    """Every string record (flags, length, bytes) in R's serialised form."""
    out, at = [], 0
    while match := R_STRING.search(raw, at):
        at = match.end()
        (length,) = struct.unpack(">i", raw[at : at + 4])
        if 0 <= length < LONGEST_STRING and at + 4 + length <= len(raw):
            out.append(raw[at + 4 : at + 4 + length].decode("utf-8", "replace"))
            at += 4 + length
    return out


def sword(root: str) -> Iterator[str]:
    """The books of a SWORD Bible module, 400 verses a document."""
    for path in files(root, "**/*.bzz"):
        verses = [line for line in _without_tags("".join(_sword_books(path))).split("\n") if line.strip()]
        for start in range(0, len(verses), 400):
            yield "\n".join(verses[start : start + 400])


def _sword_books(path: str) -> Iterator[str]:
    with open(path, "rb") as file, open(path[:-1] + "s", "rb") as file_index:
        data, index = file.read(), file_index.read()
    for place in range(0, len(index) - 11, 12):
        offset, stored, _ = struct.unpack("<3I", index[place : place + 12])
        try:
            yield zlib.decompressobj().decompress(data[offset : offset + stored]).decode("utf-8", "replace")
        except zlib.error:
            continue


def _without_tags(text: str) -> str:
    notes = r"<note.*?</note>|<rf>.*?</rf>|<RF>.*?<Rf>|<title type=\"x-gen\".*?</title>"
    text = re.sub(notes, "", text, flags=re.S | re.I)
    text = re.sub(r"</(p|l|lg|verse|title|div|chapter)>|<(lb|milestone|p|CM|br)[^>]*/?>", "\n", text)
    return tidy(html.unescape(re.sub(r"<[^>]+>", "", text)))


def catalogue(path: str) -> dict[str, str]:
    """Message -> translation of a gettext ``.mo`` file."""
    with open(path, "rb") as file:
        data = file.read()
    order = "<" if data[:4] == b"\xde\x12\x04\x95" else ">"
    _, _, count, first, second = struct.unpack(order + "5I", data[:20])

    def text(table: int, number: int) -> bytes:
        length, place = struct.unpack(order + "2I", data[table + 8 * number : table + 8 * number + 8])
        found: bytes = data[place : place + length].split(b"\0")[0]
        return found

    pairs = ((text(first, number).split(b"\4")[-1], text(second, number)) for number in range(count))
    return {key.decode("utf-8", "replace"): value.decode("utf-8", "replace") for key, value in pairs}


def wikipedia(path: str, part: str) -> Iterator[str]:
    """Articles of a bz2 dump; ``part`` is train (the first three quarters) or eval (the rest)."""
    with bz2.open(path, "rt", encoding="utf-8", errors="replace") as file:
        dump = file.read()
    pages = re.findall(r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", dump, re.S)
    pages = [(title, html.unescape(text)) for title, text in pages if _is_article(title, text)]
    cut = int(len(pages) * 0.75)
    for title, text in pages[:cut] if part == "train" else pages[cut:]:
        yield tidy(f"{title}\n\n{_wikitext(text)}")


def _is_article(title: str, text: str) -> bool:
    return not text.startswith("#REDIRECT") and ":" not in title


def _wikitext(text: str) -> str:
    text = re.sub(r"<!--.*?-->|<math>.*?</math>|<gallery.*?</gallery>", "", text, flags=re.S)
    text = re.sub(r"<ref[^>]*/>|<ref.*?</ref>", "", text, flags=re.S)
    for _ in range(6):  # templates and tables lie within each other
        text = re.sub(r"\{\{[^{}]*\}\}", "", text)
        text = re.sub(r"\{\|(?:(?!\{\|).)*?\|\}", "", text, flags=re.S)
    for _ in range(3):
        text = re.sub(r"\[\[(?:File|Image|Category|[a-z-]{2,8}):[^\[\]]*\]\]", "", text)
        text = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"'{2,}", "", re.sub(r"<[^>]+>", "", text))
    ends = r"(?m)^=+\s*(References|External links|See also|Further reading|Notes|Bibliography)\s*=+$.*?(?=^=|\Z)"
    text = re.sub(ends, "", text, flags=re.S | re.M)
    text = re.sub(r"(?m)^=+\s*(.*?)\s*=+\s*$", r"\n\1\n", text)
    return re.sub(r"(?m)^[*#:;]+\s*", "- ", text)


def archived_code(path: str, wanted: Callable[[str], object], endings: tuple[str, ...]) -> Iterator[str]:
    """Source files of a tar archive whose names are wanted and whose sizes are usual (0.4 to 200 kB)."""
    with tarfile.open(path) as archive:
        for member in archive:
            if not member.name.endswith(endings) or not wanted(member.name) or not 400 < member.size < 200_000:
                continue
            if member.isfile() and (file := archive.extractfile(member)):
                yield file.read().decode("utf-8", "replace").replace("\r\n", "\n").strip()


def translations(roots: list[str], language: str) -> dict[str, str]:
    """All gettext catalogues of a language below the folders, as one."""
    found: dict[str, str] = {}
    for root in roots:
        for path in files(root, f"**/{language}/LC_MESSAGES/*.mo"):
            found |= catalogue(path)
    return found


def austen(root: str) -> list[tuple[str, str]]:
    """(head, text) of the six novels in R's package janeaustenr."""
    novels = []
    for lines in r_strings(one_file(root, "**/janeaustenr/data/Rdata.rdb")):
        if len(lines) >= 5000:
            head = " ".join(line for line in lines[:10] if line.strip())
            novels.append((head[:60], "\n\n".join(_paragraphs(lines))))
    return novels


def _paragraphs(lines: list[str]) -> list[str]:
    stripped = "\n".join(line.strip() for line in lines)
    parts = (part.strip("\n") for part in re.split(r"\n{2,}", stripped))
    return [re.sub(r" {2,}", " ", part.replace("\n", " ")) for part in parts if part]


def dictionary(path: str) -> Iterator[str]:
    """The GCIDE dictionary without sources and pronunciations, 40 entries a document."""
    text = re.sub(
        r"\[(1913 Webster|Webster 1913 Suppl\.|PJC|WordNet 1\.5|Century Dict\. 1906|RH|AS|.{0,12}\+PJC"
        r"|Websters? 19\d\d[^\]]*)\]",
        "",
        read(path),
    )
    text = re.sub(r"\n[ \t]+\n", "\n\n", re.sub(r"[{}]", "", re.sub(r"\\[^\\\n]{1,60}\\", "", text)))
    entries = [_entry(entry) for entry in re.split(r"\n\n(?=\S)", text)]
    for start in range(0, len(entries), 40):
        yield tidy("\n\n".join(entries[start : start + 40]))


def _entry(text: str) -> str:
    lines = (line.strip() for line in text.split("\n"))
    return " ".join(line if line else "\n" for line in lines).replace(" \n ", "\n")
