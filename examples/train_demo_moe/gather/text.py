"""Plain text: read whatever the encoding, normalise, join hard-wrapped lines."""

from __future__ import annotations

import glob
import gzip
import os
import re
import unicodedata

INVISIBLE = str.maketrans({"\u00a0": " ", "\u00ad": "", "\ufeff": "", "\u200b": ""})


def files(root: str, *patterns: str) -> list[str]:
    """Plain files below ``root`` that match one of the patterns, sorted by name; no links."""
    found = {path for pattern in patterns for path in glob.glob(f"{root}/{pattern}", recursive=True)}
    return sorted(path for path in found if os.path.isfile(path) and not os.path.islink(path))


def one_file(root: str, pattern: str) -> str:
    """The file that matches; raises ``ValueError`` for none or several."""
    (path,) = files(root, pattern)
    return path


def read(path: str) -> str:
    """A file as text: gzip undone, UTF-8 or else Latin-1."""
    with open(path, "rb") as file:
        data = file.read()
    if path.endswith((".gz", ".dz")):
        data = gzip.decompress(data)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def tidy(text: str) -> str:
    """NFC, Unix lines, no control characters, no trailing blanks, at most one empty line in a row."""
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n").translate(INVISIBLE)
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text)
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def unwrap(text: str) -> str:
    """Join the hard-wrapped lines of each paragraph."""
    paragraphs = re.split(r"\n\s*\n", text)
    return "\n\n".join(re.sub(r"[ \t]*\n[ \t]*(?:> ?)?", " ", paragraph).strip() for paragraph in paragraphs)
