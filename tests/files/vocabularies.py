"""Small vocabularies as GGUF metadata, trained or grown in the test itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer

GOLDENS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data" / "tokenizer_goldens.json").read_text())
TEXTS: list[str] = GOLDENS["texts"]
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def trained(cut: PreTokenizer, size: int = 700) -> Tokenizer:
    """A byte-level BPE tokenizer that the library trained on the hard texts, cut by ``cut``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = cut
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 2, trainer)
    return tokenizer


def byte_level(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    """What a converter writes for ``tokenizer``: its tokens, three control tokens, ``<think>`` and an unused one."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    extra = [*CONTROL, "<think>", "[PAD]"]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens + extra,
        "tokenizer.ggml.token_type": [1] * len(tokens) + [3, 3, 3, 4, 5],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": len(tokens),
        "tokenizer.ggml.eos_token_id": len(tokens) + 2,
    }


def sentencepiece(pieces: list[str], *, scores: list[float] | None = None, **settings: Any) -> dict[str, Any]:
    """A SentencePiece vocabulary: three control tokens, the 256 bytes, then ``pieces``, the best first."""
    start = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": start + pieces,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces)],
        "tokenizer.ggml.scores": [0.0] * len(start) + (scores or [-float(rank) for rank in range(len(pieces))]),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **{f"tokenizer.ggml.{name}": value for name, value in settings.items()},
    }
