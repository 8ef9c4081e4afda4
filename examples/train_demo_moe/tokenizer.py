"""Train the demo model's tokenizer: byte-level BPE with Qwen2's way of cutting words, so that GGUF can name it.

python tokenizer.py corpus tokenizer.json --vocab 8192
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer

END = "<|endoftext|>"
SEPARATOR = "\n\f\n"
DOMAINS = ("prose", "docs", "code", "multilingual")
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""``tokenizer.ggml.pre`` = qwen2."""
SHARES = {"prose": 12e6, "docs": 6e6, "code": 7e6, "multilingual": 10e6}
"""Characters of each domain to learn from; English prose counts most because samples are read in it."""


def untrained() -> Tokenizer:
    """An empty tokenizer with the normaliser, the word pattern and the decoder of the qwen2 scheme."""
    tokenizer = Tokenizer(BPE(ignore_merges=False))
    tokenizer.normalizer = NFC()
    cut = Split(Regex(WORDS), "isolated")
    tokenizer.pre_tokenizer = Sequence([cut, ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = ByteLevelDecoder()
    return tokenizer


def documents(corpus: Path, domain: str) -> Iterator[tuple[str, str]]:
    """(source, text) of every document of a domain, in the order of the files."""
    for path in sorted((corpus / domain).glob("*.txt")):
        for text in path.read_text("utf-8").split(SEPARATOR):
            if text.strip():
                yield path.stem, text


def sample(corpus: Path) -> Iterator[str]:
    """Random documents of every domain up to its share."""
    for domain in DOMAINS:
        texts = [text for _, text in documents(corpus, domain)]
        random.Random(0).shuffle(texts)
        left = SHARES[domain]
        for text in texts:
            yield text[: min(len(text), 200_000)]
            left -= min(len(text), 200_000)
            if left <= 0:
                break


def train(corpus: Path, vocab: int) -> Tokenizer:
    """A tokenizer of ``vocab`` entries; the end-of-text token is number 0."""
    tokenizer = untrained()
    trainer = BpeTrainer(
        vocab_size=vocab,
        special_tokens=[AddedToken(END, special=True)],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample(corpus), trainer)
    return tokenizer


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--vocab", type=int, default=8192)
    options = parser.parse_args()
    tokenizer = train(options.corpus, options.vocab)
    tokenizer.save(str(options.output))
    print(f"{options.output}: {tokenizer.get_vocab_size()} entries")


if __name__ == "__main__":
    main()
