"""The kernel contract: against an oracle in float64, the error of a kernel is at most twice that of plain PyTorch.

Plain PyTorch means: the stored keys and values decoded to the model's precision, then softmax attention in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from turbomoe.config import KVSettings
from turbomoe.kv.cache import KVCache
from turbomoe.kv.layer import Side, Step
from turbomoe.kv.means import KVMeans
from turbomoe.kv.shape import AttentionShape
from turbomoe.kv.turns import turn


@dataclass(frozen=True)
class Case:
    """One decode step: ``lengths`` tokens before it, one for each sequence."""

    head_dim: int
    heads: int
    kv_heads: int
    type_k: str
    type_v: str
    lengths: tuple[int, ...]
    sink: int = 8
    recent: int = 32
    means: bool = True
    turning_pairs: int = 24
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    @property
    def shape(self) -> AttentionShape:
        return AttentionShape(0, self.heads, self.kv_heads, self.head_dim)


def filled(case: Case, device: str, room: int = 1) -> KVCache:
    """A cache that holds random sequences of the case's lengths, with room for more: any bits are a valid code."""
    random = torch.Generator().manual_seed(case.seed)
    means = None
    if case.means:
        keys, values, scales = (torch.randn(case.kv_heads, case.head_dim, generator=random) for _ in range(3))
        turning = 0.8 ** torch.arange(case.turning_pairs)
        means = KVMeans({0: keys}, {0: values}, "x", {0: (scales / 4).exp()}, turning)
    settings = KVSettings(case.type_k, case.type_v, case.sink, case.recent)
    cache = KVCache([case.shape], settings, slots=len(case.lengths) + 1, ctx_size=max(case.lengths) + 7 + room,
                    dtype=case.dtype, device=device, means=means)  # fmt: skip
    for slot, length in enumerate(case.lengths):
        cache.reserve(slot, length + room)
        cache.host_lengths[slot] = length
        cache.lengths[slot] = length
    for side in cache.attention[0]:
        for stored in (side.sinks, side.ring, *side.planes):
            stored.copy_(_random(stored, random))
    return cache


def _random(like: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    if not like.is_floating_point():
        return torch.randint(0, 256, like.shape, generator=random).to(torch.uint8).view(like.dtype)
    if like.dtype == torch.float16 and like.shape[-1] in (1, 2, 4, 8):  # scales: of one a vector or of q8_0's blocks
        return (
            torch.rand(like.shape, generator=random) + 0.5
            if like.shape[-1] == 1
            else torch.rand(like.shape, generator=random) / 64
        )
    return torch.randn(like.shape, generator=random) + 0.5


def hold(cache: KVCache, tokens: int) -> None:
    """Let slot 0 hold ``tokens`` random tokens, made where the cache is: for caches too large for ``filled``."""
    cache.reserve(0, tokens + 1)
    cache.host_lengths[0] = tokens
    cache.lengths[0] = tokens
    for side in (side for pair in cache.attention.values() for side in pair):
        for stored in (side.sinks, side.ring, *side.planes):
            if stored.shape[-1] == 1:  # scales
                stored.uniform_(0.5, 1.5)
            elif stored.is_floating_point():
                stored.normal_()
            else:
                stored.view(torch.uint8).random_(0, 256)


def open_step(cache: KVCache, slots: list[int]) -> Step:
    """What ``begin`` opens for one new token a sequence, without encoding what leaves the windows."""
    index = torch.tensor(slots, device=cache.device)
    lengths = [cache.host_lengths[slot] for slot in slots]
    return Step(index, cache.lengths[index], cache.pages.table[index], 1, min(lengths), max(lengths) + 1)


def fresh(case: Case, batch: int, count: int, random: torch.Generator, device: str) -> list[torch.Tensor]:
    """Queries, keys and values of new tokens [B, (kv_)heads, count, head_dim]; the latter with a common part."""
    parts = ((case.heads, 0.0), (case.kv_heads, 1.0), (case.kv_heads, 0.5))
    made = [torch.randn(batch, heads, count, case.head_dim, generator=random) + common for heads, common in parts]
    return [tensor.to(device, case.dtype) for tensor in made]


def dense(side: Side, new: torch.Tensor, step: Step, row: int) -> torch.Tensor:
    """Every token of sequence ``row`` as attention should see it: float64 [kv_heads, tokens, head_dim], in order."""
    start, slot = int(step.starts[row]), int(step.slots[row])
    sinks = side.sinks[slot][:, : min(start, side.sink)].double()
    coded = max(0, start - side.sink - side.recent) if side.sink + side.recent else start
    parts = [sinks]
    if coded:
        one = Step(
            step.slots[row : row + 1], step.starts[row : row + 1], step.pages[row : row + 1], 1, start, start + 1
        )
        codes = side.decode(one, 0, -(-coded // 64))[0][:, :coded]
        codes = side.unrotate(codes) if side.rotated else codes
        parts.append(_whole(side, codes).double())
    if side.recent:
        positions = torch.arange(max(sinks.shape[1], start - side.recent), start, device=new.device)
        parts.append(side.ring[slot][:, positions % side.recent].double())
    parts.append(new[row].to(side.exact_dtype).double())
    return torch.cat(parts, 1)


def _whole(side: Side, codes: torch.Tensor) -> torch.Tensor:
    """Decoded vectors [kv_heads, tokens, head_dim] with what was taken off before coding."""
    if side.scale is not None:
        codes = codes * side.scale[:, None]
    if side.mean is None:
        return codes
    if side.turns is None:
        return codes + side.mean[:, None]
    page = torch.arange(codes.shape[1], device=codes.device) // 64
    return codes + turn(side.mean[:, None], side.turns[page])


def softmax_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """query [heads, head_dim]; key, value [kv_heads, tokens, head_dim], in their own precision."""
    group = query.shape[0] // key.shape[0]
    q = query.to(key.dtype).unflatten(0, (-1, group))
    weights = (q @ key.mT * scale).softmax(-1)
    return (weights @ value).flatten(0, 1)


def errors(case: Case, attend, device: str) -> tuple[float, float]:
    """(kernel's, PyTorch's): the error relative to the oracle's norm, over all sequences."""
    cache = filled(case, device)
    random = torch.Generator().manual_seed(case.seed + 1)
    batch = len(case.lengths)
    query, key, value = fresh(case, batch, 1, random, device)
    scale = case.head_dim**-0.5
    step = open_step(cache, list(range(batch)))
    keys, values = cache.attention[0]
    full = [(dense(keys, key, step, row), dense(values, value, step, row)) for row in range(batch)]
    oracle = torch.stack([softmax_attention(query[i, :, 0].double(), *kv, scale) for i, kv in enumerate(full)])
    lowest = torch.bfloat16 if "bf16" in (case.type_k, case.type_v) else case.dtype  # what the cache itself keeps
    plain = torch.stack(
        [softmax_attention(query[i, :, 0], *(x.to(lowest) for x in kv), scale) for i, kv in enumerate(full)]
    )
    ours = attend(query, key, value, keys, values, step, scale)[:, 0]
    return _relative(ours, oracle), _relative(plain, oracle)


def _relative(x: torch.Tensor, oracle: torch.Tensor) -> float:
    return float((x.double() - oracle).norm() / oracle.norm())
