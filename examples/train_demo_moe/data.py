"""Tokenised text in one compressed file: training and held-out parts of each domain, and the evaluation texts.

    python data.py corpus tokenizer.json tokens.xz

The file is xz over one line of JSON and 16-bit token numbers. A held-out document never also trains.
"""

from __future__ import annotations

import argparse
import json
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizer import DOMAINS, END, documents
from tokenizers import Tokenizer

Tokens = npt.NDArray[np.uint16]
HELD_OUT = 60
"""One document in this many is held out."""
HELD_TOKENS = 200_000
LONGEST_HELD = 300_000
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 2, "lp": 1, "pb": 1, "dict_size": 64 << 20}]


@dataclass(frozen=True)
class Part:
    """``split`` is train, held or eval; eval parts are named after their text and have no domain of their own."""

    split: str
    domain: str
    tokens: Tokens
    text_bytes: int


def encode(tokenizer: Tokenizer, texts: list[str], end: int) -> Tokens:
    """All texts in a row, each followed by the end-of-text token."""
    pieces = []
    for start in range(0, len(texts), 256):
        for encoding in tokenizer.encode_batch_fast(texts[start : start + 256], add_special_tokens=False):
            pieces.append(np.array([*encoding.ids, end], dtype=np.uint16))
    return np.concatenate(pieces) if pieces else np.zeros(0, np.uint16)


def split_domain(corpus: Path, domain: str) -> tuple[list[str], list[str]]:
    """(training, held-out) texts, chosen by a checksum of the text so that another run chooses the same."""
    train: list[str] = []
    held: list[str] = []
    for _, text in documents(corpus, domain):
        chosen = len(text) < LONGEST_HELD and zlib.crc32(text.encode()) % HELD_OUT == 0
        (held if chosen else train).append(text)
    return train, held


def build(corpus: Path, tokenizer: Tokenizer) -> Iterator[Part]:
    """Every part of the corpus."""
    end = tokenizer.token_to_id(END)
    if end is None:
        raise ValueError(f"the tokenizer has no token {END}: make it with tokenizer.py")
    for domain in DOMAINS:
        for split, texts in zip(("train", "held"), split_domain(corpus, domain), strict=True):
            tokens = encode(tokenizer, texts, end)
            size = sum(len(text.encode()) for text in texts)
            if split == "held" and len(tokens) > HELD_TOKENS:
                size, tokens = size * HELD_TOKENS // len(tokens), tokens[:HELD_TOKENS]
            yield Part(split, domain, tokens, size)
    for path in sorted((corpus / "eval").glob("*.txt")):
        text = path.read_text("utf-8")
        yield Part("eval", path.stem, encode(tokenizer, [text], end), len(text.encode()))


def write(parts: list[Part], path: Path) -> None:
    """Write all parts to ``path``."""
    rows = [[part.split, part.domain, len(part.tokens), part.text_bytes] for part in parts]
    with lzma.open(path, "wb", format=lzma.FORMAT_XZ, filters=FILTERS) as file:
        file.write(json.dumps({"parts": rows}).encode() + b"\n")
        for part in parts:
            file.write(part.tokens.tobytes())


def read(path: Path) -> list[Part]:
    """The parts of a file that ``write`` made."""
    with lzma.open(path) as file:
        rows = json.loads(file.readline())["parts"]
        stream = np.frombuffer(file.read(), dtype=np.uint16)
    ends = np.cumsum([row[2] for row in rows])
    if ends[-1] != len(stream):
        raise ValueError(f"{path}: {len(stream)} tokens where {ends[-1]} were announced")
    pieces = np.split(stream, ends[:-1])
    return [Part(row[0], row[1], tokens, row[3]) for row, tokens in zip(rows, pieces, strict=True)]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    parts = list(build(options.corpus, Tokenizer.from_file(str(options.tokenizer))))
    for part in parts:
        ratio = part.text_bytes / max(1, len(part.tokens))
        print(f"{part.split:6} {part.domain:24} {len(part.tokens):>12,} tokens  {ratio:.2f} bytes a token", flush=True)
    write(parts, options.output)
    print(f"{options.output}: {options.output.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
