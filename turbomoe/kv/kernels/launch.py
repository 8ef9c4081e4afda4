"""Attention of one new token a sequence on a GPU: what ``kv/decode.py`` computes, by the kernels of ``decode.py``."""

from __future__ import annotations

import functools

import torch
import triton

from turbomoe.kv.hadamard import random_signs
from turbomoe.kv.kernels import QUERIES, decode
from turbomoe.kv.kernels.attend import attend
from turbomoe.kv.kernels.layout import chunks, in_bytes
from turbomoe.kv.kernels.stored import code_bytes, interpreted, kind_of, processors, stored
from turbomoe.kv.layer import Side, Step
from turbomoe.kv.pages import PAGE_TOKENS

PROGRAMS_PER_SM = 3
EARLY = True
BLOCK, COLUMNS = 64, 32  # parts that are merged at a time, and columns of a program that does
WARPS, REGISTERS = 4, 168  # registers a thread so that three programs fit an SM
STAGES = 3  # of the compiler's prefetching, for what the kernel does not read ahead itself
COMPILER_READ = {"bf16", "f16", "f32", "q8_0"}
NEVER = 2**31 - 1  # more tokens than any context: nothing lies that far behind


@functools.lru_cache(maxsize=8)
def _launches_early(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it ends: from compute capability 9 on."""
    return bool(EARLY and torch.cuda.get_device_capability(device) >= (9, 0))


@functools.lru_cache(maxsize=16)
def _signs(head_dim: int, device: str) -> torch.Tensor:
    """The rotation's signs with its norm."""
    signs: torch.Tensor = random_signs(head_dim, device) * head_dim**-0.5
    return signs


def attend_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keys: Side, values: Side, step: Step, scale: float,
    asm: bool = True,
) -> torch.Tensor:  # fmt: skip
    """``decode.attend_one``: query [B, heads, 1, dim], key, value [B, kv_heads, 1, dim].

    Returns float32 [B, 1, heads, dim].
    """
    batch, heads, _, dim = query.shape
    kv_heads = key.shape[1]
    key, value = (x.to(side.exact_dtype).contiguous() for x, side in ((key, keys), (value, values)))
    paged = keys.is_exact and values.is_exact
    if keys.recent == 0:  # nothing leaves a ring later: the new token is encoded now, and read exactly beside its code
        keys.keep(key, step)
        values.keep(value, step)
    device, rows = query.device, batch * heads
    asm = asm and not interpreted()
    early = asm and _launches_early(device)
    capacity = step.pages.shape[1] if keys.codec is not None else 1
    splits = max(1, min(capacity, PROGRAMS_PER_SM * processors(device) // (batch * kv_heads)))
    windows = 0 if paged else triton.cdiv(keys.sink + keys.recent + 1, PAGE_TOKENS)
    parts = batch * kv_heads * (splits + windows)
    bytes_ = in_bytes(kind_of(keys))
    turned = torch.empty(rows, 2 if bytes_ else 1, dim, dtype=torch.int8 if bytes_ else torch.float16, device=device)
    factors = torch.empty(rows, dtype=torch.float32, device=device)
    lifts = torch.empty(rows, dtype=torch.int32, device=device)
    offsets = torch.empty(rows, capacity if keys.mean is not None else 1, dtype=torch.float32, device=device)
    tops, totals = torch.empty(2, parts, QUERIES, dtype=torch.float32, device=device)
    far = torch.empty(parts, QUERIES, dim, dtype=torch.float16, device=device)
    out = torch.empty(batch, 1, heads, dim, dtype=torch.float32, device=device)
    signs = _signs(dim, str(device))
    shape = {"HEADS": heads, "GROUP": heads // kv_heads, "D": dim}
    halves = chunks(dim, kind_of(keys), kind_of(values))
    k, v = (stored(side, dim, side is keys, halves, str(device)) for side in (keys, values))
    mean_k, mean_v = (signs if side.mean is None else side.mean for side in (keys, values))
    blocks = triton.cdiv(capacity, 16) if keys.mean is not None else 0
    pairs = 0 if keys.turns is None else keys.turns.shape[1] // 2
    # Never with launch_pdl: what attend reads before it waits is safe only because this starts in order.
    decode.prepare[(rows, 1 + blocks)](
        query, turned, factors, lifts, offsets, k[-1], signs, mean_k, signs if keys.scale is None else keys.scale,
        signs if keys.turns is None else keys.turns, scale, query.stride(0), query.stride(1), capacity, **shape,
        K_KIND=kind_of(keys), ROTATED=keys.rotated, HAS_MEAN=keys.mean is not None, HAS_SPREAD=keys.scale is not None,
        PAIRS=pairs, HALF=triton.next_power_of_2(max(pairs, 1)), EARLY=early, num_warps=1,
    )  # fmt: skip
    behind = -1 if paged else NEVER if keys.codec is None else keys.sink + keys.recent
    stages = 1 if COMPILER_READ.isdisjoint((kind_of(keys), kind_of(values))) else STAGES
    precision = "ieee" if torch.float32 in (keys.exact_dtype, values.exact_dtype) else "tf32"
    attend[(splits + windows, batch * kv_heads)](
        query, turned, factors, lifts, offsets, step.starts, step.slots, step.pages, *k[:4], keys.sinks, keys.ring, key,
        *v[:4], values.sinks, values.ring, value, tops, totals, far, scale, capacity, query.stride(0),
        query.stride(1), **shape, KV_HEADS=kv_heads, SINK=keys.sink, RECENT=keys.recent, BEHIND=behind,
        K_KIND=kind_of(keys), V_KIND=kind_of(values), K_WIDTH=code_bytes(keys), V_WIDTH=code_bytes(values),
        HAS_MEAN=keys.mean is not None, SPLITS=splits, WINDOWS=windows, CHUNKS=halves, STAGES=stages, EARLY=early,
        ASM=asm, PRECISION=precision, num_warps=WARPS, maxnreg=REGISTERS, launch_pdl=early,
    )  # fmt: skip
    sums = torch.empty(2, rows, dim, dtype=torch.float32, device=device)
    shares = torch.empty(2, rows, dtype=torch.float32, device=device)
    decode.merge[(rows, dim // COLUMNS)](
        sums, shares, tops, totals, far, step.starts, **shape, KV_HEADS=kv_heads, BEHIND=behind, SPLITS=splits,
        WINDOWS=windows, PARTS=triton.next_power_of_2(splits + windows),
        WINDOW_ROWS=triton.next_power_of_2(windows + 1),
        EARLY=early, BLOCK=BLOCK, COLUMNS=COLUMNS, num_warps=4, launch_pdl=early,
    )  # fmt: skip
    decode.finish[(rows,)](
        out, sums, shares, v[-1], step.starts, step.slots, signs, mean_v, keys.sinks, keys.ring, key, values.sinks,
        values.ring, value, **shape, KV_HEADS=kv_heads, SINK=keys.sink, RECENT=keys.recent, ROTATED=values.rotated,
        HAS_MEAN=values.mean is not None, EARLY=early, num_warps=1, launch_pdl=early,
    )  # fmt: skip
    return out
