"""The registry of KV codecs: a name the user types, and the codec it means for a head size.

Builders import late: a cache in bf16 never loads the codecs, the codebooks and the rotation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from turbomoe.errors import SettingsError
from turbomoe.kv.base import Codec
from turbomoe.kv.codecs.plain import PlainCodec
from turbomoe.kv_types import TRELLIS, kv_type


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
    **{name: partial(_trellis, name) for name in TRELLIS},
}


def make_codec(name: str, head_dim: int) -> Codec:
    """The codec called ``name`` (or an alias, in any case) for vectors of ``head_dim`` values.

    Raises ``SettingsError`` for an unknown name, and for a head size that the codec cannot store.
    """
    build = CODECS.get(kv_type(name))
    if build is None:
        raise SettingsError(f"The KV type {name!r} is a wish and no codec", fix="Choose one of " + ", ".join(CODECS))
    return build(head_dim)
