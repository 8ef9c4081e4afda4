"""The registry of KV codecs: a name the user types, and the codec it means for a head size.

Builders import late: a cache in bf16 never loads the codecs, the codebooks and the rotation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from turbomoe.config import KV_TYPE_ALIASES
from turbomoe.errors import SettingsError
from turbomoe.kv.base import Codec
from turbomoe.kv.codecs.plain import PlainCodec


def _q8_0(head_dim: int) -> Codec:
    from turbomoe.kv.codecs.q8_0 import Q8Codec

    return Q8Codec(head_dim)


def _lloyd_max(bits: int, head_dim: int) -> Codec:
    from turbomoe.kv.codecs.lloydmax import LloydMaxCodec

    return LloydMaxCodec(bits, head_dim)


def _trellis(name: str, head_dim: int) -> Codec:
    from turbomoe.kv.codecs.trellis import TrellisCodec

    return TrellisCodec(name, head_dim)


CODECS: dict[str, Callable[[int], Codec]] = {
    "f32": partial(PlainCodec, "f32", torch.float32),
    "f16": partial(PlainCodec, "f16", torch.float16),
    "bf16": partial(PlainCodec, "bf16", torch.bfloat16),
    "q8_0": _q8_0,
    "tq4": partial(_lloyd_max, 4),
    "tq3": partial(_lloyd_max, 3),
    "tq2": partial(_lloyd_max, 2),
    **{name: partial(_trellis, name) for name in ("tcq4", "tcq3", "tcq2.5", "tcq2")},
}


def make_codec(name: str, head_dim: int) -> Codec:
    """The codec called ``name`` (or an alias) for vectors of ``head_dim`` values.

    Raises ``SettingsError`` for an unknown name, and for a head size that the codec cannot store.
    """
    build = CODECS.get(KV_TYPE_ALIASES.get(name, name))
    if build is None:
        aliases = ", ".join(f"{alias} = {known}" for alias, known in KV_TYPE_ALIASES.items())
        fix = f"choose one of {', '.join(CODECS)} ({aliases})"
        raise SettingsError(f"Unknown KV cache type {name!r}", fix=f"{fix}, or auto for -ctk and -ctv")
    return build(head_dim)
