"""Decode steps of a lone sequence on the CPU: whole layers in one call of the C core (``native/src/decoder.h``).

At batch 1 Python and PyTorch cost more than small models compute: 60 calls a layer here, none there. The arithmetic is
that of the body it stands for: int8 activations into packed matrices, float32 else.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from turbomoe.kv.cache import KVCache
from turbomoe.kv.layer import Step
from turbomoe.kv.native import describe, readable
from turbomoe.kv.shape import AttentionShape
from turbomoe.models.packed import LinearRoom, PackedLinear, linear_room
from turbomoe.native.library import CDecoderCall, CDecoderLayer, CProjection, NativeError, check_status
from turbomoe.native.pool import WorkerPool

Angles = tuple[torch.Tensor, torch.Tensor]
Layers = ctypes.Array[CDecoderLayer]


def make_decoder(
    modules: Sequence[Any], shapes: Sequence[AttentionShape], norms: Sequence[torch.Tensor | None], eps: float,
    rotary: int,
) -> NativeDecoder | None:  # fmt: skip
    """The decoder of stock pre-norm layers ``modules``; None unless all their attention is packed and there is a core.

    ``norms``: the weights of the queries' and keys' norms, float32 [query_heads + kv_heads, head_dim], by layer.
    ``rotary``: how many channels of a head turn.
    """
    if not all(readable(shape) for shape in shapes):
        return None
    layers = []
    for module, shape, norm in zip(modules, shapes, norms, strict=True):
        layer = _layer(module, shape, norm, eps, rotary)
        if layer is None:
            return None
        layers.append(layer)
    pools = {module.self_attn.o_proj.pool for module in modules}
    if len(pools) != 1 or (pool := pools.pop()) is None:
        return None
    return NativeDecoder(layers, shapes, pool, (modules, norms))


class NativeDecoder:
    """Layers in the core's terms. ``computes_ffn`` tells, layer by layer, whether the FFN is among them."""

    def __init__(
        self, layers: Sequence[CDecoderLayer], shapes: Sequence[AttentionShape], pool: WorkerPool, held: Any
    ) -> None:
        self._layers, self._shapes, self._held = layers, shapes, held  # ``held`` keeps the weights alive
        self.computes_ffn = [bool(layer.up.count) for layer in layers]
        self._room: LinearRoom = linear_room(pool)
        self._hidden = int(layers[0].out.rows)
        wide = max(max(layer.qkv.rows, layer.up.rows) for layer in layers)
        sizes = self._hidden, wide, max(s.query_heads for s in shapes), max(s.head_dim for s in shapes)
        self._work = pool.core.decoder_work_new(pool.handle, *sizes)
        if not self._work:
            raise NativeError("No room for decoding in the C core", why=f"layers of {self._hidden} values")
        weakref.finalize(self, _free, pool, self._work)
        projections = [p for layer in layers for p in (layer.qkv, layer.out, layer.up, layer.down)]
        widest = max(matrix.cols for p in projections for matrix in p.matrices[: p.count])
        with self._room.lock:
            self._room.reserve(widest)
        self._programs: weakref.WeakKeyDictionary[KVCache, Layers | None] = weakref.WeakKeyDictionary()

    def program(self, memory: KVCache, step: Step, x: torch.Tensor) -> Layers | None:
        """The layers over ``memory``; None where this step has to be run otherwise."""
        if step.lone is None or step.count != 1 or memory.observer is not None or x.dtype != torch.float32:
            return None
        if memory not in self._programs:
            self._programs[memory] = self._over(memory)
        return self._programs[memory]

    def run(self, program: Layers, layers: range, x: torch.Tensor, step: Step, angles: Angles) -> None:
        """Run some layers on x float32 [1, hidden], which is changed in place."""
        assert x.is_contiguous() and step.lone is not None
        cos, sin = (angle.contiguous() for angle in angles)
        first = ctypes.addressof(program) + layers.start * ctypes.sizeof(CDecoderLayer)
        with self._room.lock:
            call = CDecoderCall(self._work, self._room.work, first, len(layers), self._hidden, step.lone, step.floor,
                                step.pages.data_ptr(), x.data_ptr(), cos.data_ptr(), sin.data_ptr())  # fmt: skip
            self._room.pool.core.decoder_run(ctypes.addressof(call))
        check_status(call.status)

    def _over(self, memory: KVCache) -> Layers | None:
        layers = (CDecoderLayer * len(self._layers))(*self._layers)
        for layer, shape in zip(layers, self._shapes, strict=True):
            kv = describe(shape, *memory.attention[shape.layer])
            if kv is None:
                return None
            layer.kv = kv
        return layers


def _free(pool: WorkerPool, work: int) -> None:
    pool.core.decoder_work_free(work)


def _layer(
    module: Any, shape: AttentionShape, norm: torch.Tensor | None, eps: float, rotary: int
) -> CDecoderLayer | None:
    qkv = _projection(module.self_attn, "q_proj", "k_proj", "v_proj")
    out = _projection(module.self_attn, "o_proj")
    if qkv is None or out is None:
        return None
    up, down = _projection(module.mlp, "gate_proj", "up_proj"), _projection(module.mlp, "down_proj")
    if up is None or down is None:
        up = down = CProjection()
    weights = [module.input_layernorm.weight, module.post_attention_layernorm.weight, norm]
    if any(w is not None and (w.dtype != torch.float32 or not w.is_contiguous()) for w in weights):
        return None
    addresses = [None if w is None else w.data_ptr() for w in weights]
    scale = float(module.self_attn.scaling)
    assert qkv.rows == (shape.query_heads + 2 * shape.kv_heads) * shape.head_dim
    return CDecoderLayer(qkv=qkv, out=out, up=up, down=down, mixer_norm=addresses[0], ffn_norm=addresses[1],
                         head_norm=addresses[2], eps=eps, scale=scale, rotary=rotary)  # fmt: skip


def _projection(module: nn.Module, *names: str) -> CProjection | None:
    """Projections of one input; None unless all of them are packed, and take their input as it is."""
    linears = [getattr(module, name, None) for name in names]
    packed = [x for x in linears if isinstance(x, PackedLinear) and x.columns is None]
    if len(packed) < len(linears):
        return None
    found = CProjection(len(packed), sum(linear.out_features for linear in packed))
    for i, linear in enumerate(packed):
        found.matrices[i] = linear.matrix.c_linear()
    return found
