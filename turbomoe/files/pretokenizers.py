"""How byte-level BPE cuts text into words before merging, by GGUF's name (``tokenizer.ggml.pre``).

The patterns are facts of the vocabularies: merges were learned inside these words, another cut gives other tokens.
Sources: llama.cpp's vocabulary loader and the ``tokenizer.json`` of the model families.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _words(digits: str, letter: str = r"\p{L}", mark: str = "") -> str:
    """The cl100k pattern: contractions, a word with one leading sign, ``digits`` at a time, signs, spaces."""
    word = rf"[^\r\n\p{{L}}\p{{N}}]?{letter}+"
    signs = rf" ?[^\s\p{{L}}{mark}\p{{N}}]+[\r\n]*"
    return rf"{CONTRACTION}|{word}|{digits}|{signs}|{SPACES}"


def _cased_words(digits: str, contraction: str) -> str:
    """The o200k pattern: words also end where the case turns from lower to upper."""
    sign = r"[^\r\n\p{L}\p{N}]?"
    signs = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
    return rf"{sign}{UPPER}*{LOWER}+{contraction}|{sign}{UPPER}+{LOWER}*{contraction}|{digits}|{signs}|{SPACES}"


def _split(*patterns: str) -> PreTokenizer:
    cuts = [Split(Regex(pattern), "isolated") for pattern in patterns]
    return Sequence([*cuts, ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2() -> PreTokenizer:
    return ByteLevel(add_prefix_space=False, use_regex=True)


def _single_digits() -> PreTokenizer:
    return Sequence([Digits(individual_digits=True), _gpt2()])


@dataclass(frozen=True)
class PreScheme:
    """``build`` makes the pre-tokenizer; ``nfc`` composes the text first; ``whole_words`` takes a word that is itself a
    token without merging; ``add_bos`` holds where the file does not say.
    """

    build: Callable[[], PreTokenizer]
    nfc: bool = False
    whole_words: bool = False
    add_bos: bool = False


_LLAMA3 = PreScheme(lambda: _split(_words(r"\p{N}{1,3}")), whole_words=True, add_bos=True)
_GLM4 = PreScheme(lambda: _split(_words(r"\p{N}{1,3}")), whole_words=True)
_QWEN2 = PreScheme(lambda: _split(_words(r"\p{N}")), nfc=True)
_QWEN35 = PreScheme(lambda: _split(_words(r"\p{N}", letter=r"[\p{L}\p{M}]", mark=r"\p{M}")), nfc=True)
_GPT4O = PreScheme(lambda: _split(_cased_words(r"\p{N}{1,3}", f"{CONTRACTION}?")), whole_words=True)
_TEKKEN = PreScheme(lambda: _split(_cased_words(r"\p{N}", "")), whole_words=True, add_bos=True)
_GPT2 = PreScheme(_gpt2)
_DIGITS = PreScheme(_single_digits)
_DEFAULT = PreScheme(lambda: _split(r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))

PRE_TOKENIZERS = {
    "default": _DEFAULT,
    "gpt-2": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "glm4": _GLM4,
    "qwen2": _QWEN2,
    "qwen35": _QWEN35,
    "gpt-4o": _GPT4O,
    "llama4": _GPT4O,
    "tekken": _TEKKEN,
}
