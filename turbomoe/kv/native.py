"""One layer's memory as the C core reads it, for attention of one new token (``native/src/attend.h``)."""

from __future__ import annotations

from functools import cache

import torch

from turbomoe.kv.base import Codec
from turbomoe.kv.codebooks import levels
from turbomoe.kv.hadamard import random_signs
from turbomoe.kv.layer import Side
from turbomoe.kv.shape import AttentionShape
from turbomoe.kv.trellis_codebook import TRELLISES, by_window
from turbomoe.native.library import TYPES, CKVLayer, CKVSide

KINDS = {"f32": 0, "bf16": 1, "f16": 2, "q8_0": 3, "tq2": 4, "tq3": 5, "tq4": 6,
         "tcq2": 8, "tcq2.5": 9, "tcq3": 10, "tcq4": 11}  # fmt: skip
NO_PAGES = 7  # a sliding window
GROUP, LANES, DIM = 16, 16, 256  # most queries a key head, values that a vector comes in, most values of a head


def readable(shape: AttentionShape) -> bool:
    """Whether the C core reads heads of this shape."""
    group = shape.query_heads // shape.kv_heads
    return shape.head_dim % LANES == 0 and shape.head_dim <= DIM and group <= GROUP


@cache
def _signs(head_dim: int) -> torch.Tensor:
    """The rotation's signs at an address that stays: descriptions hold it."""
    return random_signs(head_dim).clone()


def describe(shape: AttentionShape, keys: Side, values: Side) -> CKVLayer | None:
    """The layer's memory, which has to outlive the description; None if the C core does not read it.

    It does not read heads that are no multiple of 16 values or longer than 256, more than 16 queries a key head, codes
    without an exact window, and codecs that it does not know.
    """
    if not readable(shape):
        return None
    if keys.recent == 0 and not (keys.is_exact and values.is_exact):
        return None
    sides = [_side(side) for side in (keys, values)]
    if None in sides:
        return None
    signs = _signs(shape.head_dim).data_ptr() if keys.rotated or values.rotated else None
    return CKVLayer(shape.query_heads, shape.kv_heads, shape.head_dim, keys.sink, keys.recent, *sides, signs)


def _side(side: Side) -> CKVSide | None:
    kind = NO_PAGES if side.codec is None else KINDS.get(side.codec.name)
    if kind is None or side.ring.device.type != "cpu":
        return None
    exact = TYPES[str(side.exact_dtype).removeprefix("torch.")]
    found = CKVSide(kind, exact, side.sinks.data_ptr(), side.ring.data_ptr())
    if side.planes:
        found.codes = side.planes[0].data_ptr()
        found.scales = side.planes[1].data_ptr() if len(side.planes) > 1 else None
    if side.mean is not None:
        found.mean = _address(side.mean)
    if side.scale is not None:
        found.scale = _address(side.scale)
    if side.turns is not None:
        found.turns, found.pairs = _address(side.turns), side.turns.shape[1] // 2
    _add_values(found, side.codec)
    return found


def _add_values(found: CKVSide, codec: Codec | None) -> None:
    """What codes stand for."""
    if codec is None or not codec.rotated:
        return
    if codec.name in TRELLISES:
        found.codebook = by_window(TRELLISES[codec.name]).data_ptr()
    else:
        table = levels(int(codec.name[-1]))
        found.levels[: len(table)] = table


def _address(x: torch.Tensor) -> int:
    assert x.is_contiguous() and x.dtype == torch.float32
    return x.data_ptr()
