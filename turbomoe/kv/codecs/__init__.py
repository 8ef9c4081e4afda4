"""The registry of KV codecs: a name the user types, and the codec it means for a head size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from turbomoe.config import KV_TYPE_ALIASES
from turbomoe.errors import SettingsError
from turbomoe.kv.base import Codec
from turbomoe.kv.codecs.lloydmax import LloydMaxCodec
from turbomoe.kv.codecs.plain import PlainCodec
from turbomoe.kv.codecs.q8_0 import Q8Codec

CODECS: dict[str, Callable[[int], Codec]] = {
    "f32": partial(PlainCodec, "f32", torch.float32),
    "f16": partial(PlainCodec, "f16", torch.float16),
    "bf16": partial(PlainCodec, "bf16", torch.bfloat16),
    "q8_0": Q8Codec,
    "tq4": partial(LloydMaxCodec, 4),
    "tq3": partial(LloydMaxCodec, 3),
    "tq2": partial(LloydMaxCodec, 2),
}


def make_codec(name: str, head_dim: int) -> Codec:
    """The codec called ``name`` (or an alias) for vectors of ``head_dim`` values.

    Raises ``SettingsError`` for an unknown name, and for a head size that the codec cannot store.
    """
    build = CODECS.get(KV_TYPE_ALIASES.get(name, name))
    if build is None:
        aliases = ", ".join(f"{alias} = {known}" for alias, known in KV_TYPE_ALIASES.items())
        raise SettingsError(f"Unknown KV cache type {name!r}", fix=f"choose one of {', '.join(CODECS)} ({aliases})")
    return build(head_dim)
