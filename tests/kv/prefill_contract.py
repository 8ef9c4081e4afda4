"""The kernel contract (``contract.py``) for a block of new tokens: an oracle in float64 for some of its queries."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tests.kv.contract import Case, _random, _relative, fresh, softmax_attention
from turbomoe.config import KVSettings
from turbomoe.kv.attention import query_block
from turbomoe.kv.cache import KVCache
from turbomoe.kv.layer import Side, Step
from turbomoe.kv.means import KVMeans
from turbomoe.kv.turns import turn


@dataclass(frozen=True)
class Chunk(Case):
    """``count`` new tokens of each sequence, after ``lengths``; ``looked_at`` of their queries are compared."""

    count: int = 70
    looked_at: int = 5


def filled(chunk: Chunk, device: str) -> KVCache:
    """A cache that holds random sequences of the chunk's lengths, with room for it; every bit pattern is a valid code."""
    random = torch.Generator().manual_seed(chunk.seed)
    settings = KVSettings(chunk.type_k, chunk.type_v, chunk.sink, chunk.recent)
    cache = KVCache([chunk.shape], settings, slots=len(chunk.lengths) + 1, ctx_size=max(chunk.lengths) + chunk.count,
                    dtype=chunk.dtype, device=device, means=_means(chunk, random) if chunk.means else None)  # fmt: skip
    for slot, length in reversed(list(enumerate(chunk.lengths))):  # so that slots and pages are in no order
        cache.reserve(slot, length + chunk.count)
        cache.host_lengths[slot] = length
        cache.lengths[slot] = length
    for side in cache.attention[0]:
        for stored in (side.sinks, side.ring, *side.planes):
            stored.copy_(_random(stored, random))
    return cache


def _means(chunk: Chunk, random: torch.Generator) -> KVMeans:
    keys, values, scales = (torch.randn(chunk.kv_heads, chunk.head_dim, generator=random) for _ in range(3))
    turned = 0.8 ** torch.arange(3 * chunk.head_dim // 8)
    return KVMeans({0: keys}, {0: values}, "test", {0: (scales / 4).exp()}, turned)


def seen(side: Side, exact: torch.Tensor, step: Step, row: int, t: int) -> torch.Tensor:
    """What the query at position t sees of sequence ``row``: float64 [kv_heads, t + 1, head_dim], in order.

    exact [B, kv_heads, recent + count, head_dim]: ring in order and chunk; call it after they have been stored.
    """
    start, slot = int(step.starts[row]), int(step.slots[row])
    parts = [side.sinks[slot][:, : min(t + 1, side.sink)].double()]
    coded = max(0, t - side.sink - side.recent)
    if coded and side.codec is not None:
        one = Step(step.slots[row : row + 1], step.starts[row : row + 1], step.pages[row : row + 1], 1, start, start + 1)
        parts.append(_decoded(side, one, coded))
    positions = torch.arange(min(t + 1, max(side.sink, t - side.recent)), t + 1, device=exact.device)
    parts.append(exact[row][:, positions - start + side.recent].double())
    return torch.cat(parts, 1)


def _decoded(side: Side, step: Step, count: int) -> torch.Tensor:
    codes = side.decode(step, 0, -(-count // 64))[0][:, :count]
    codes = side.unrotate(codes) if side.rotated else codes
    codes = codes if side.scale is None else codes * side.scale[:, None]
    if side.mean is None:
        return codes.double()
    mean = side.mean[:, None].expand_as(codes)
    if side.turns is not None:
        mean = turn(mean, side.turns.repeat_interleave(64, 0)[:count])
    return codes.double() + mean.double()


def stored_and_attended(query, key, value, keys: Side, values: Side, step: Step, scale: float, attend_block):
    """``attention.attend`` with this function for its blocks: (output, exact keys, exact values)."""
    key, value = key.to(keys.exact_dtype), value.to(values.exact_dtype)
    exacts = [torch.cat([side.past(step), new], 2) for side, new in ((keys, key), (values, value))]
    for side, new, exact in ((keys, key, exacts[0]), (values, value, exacts[1])):
        side.keep_sinks(new, step)
        side.store(exact[:, :, : step.count], step)
        side.keep_recent(new, step)
    size = query_block(query.device.type)
    blocks = [attend_block(query[:, :, i : i + size], i, *exacts, keys, values, step, scale) for i in range(0, step.count, size)]
    return torch.cat(blocks, 1), *exacts


def errors(chunk: Chunk, attend_block, device: str) -> tuple[float, float]:
    """(kernel's, PyTorch's): the error relative to the oracle's norm, over some queries of all sequences."""
    cache = filled(chunk, device)
    batch, scale = len(chunk.lengths), chunk.head_dim**-0.5
    query, key, value = fresh(chunk, batch, chunk.count, torch.Generator().manual_seed(chunk.seed + 1), device)
    key, value = key[:, : chunk.kv_heads], value[:, : chunk.kv_heads]
    keys, values = cache.attention[0]
    step = cache.begin(list(range(batch)), chunk.count)
    ours, *exacts = stored_and_attended(query, key, value, keys, values, step, scale, attend_block)
    at = torch.linspace(0, chunk.count - 1, min(chunk.count, chunk.looked_at)).long().tolist()
    oracle, plain = [], []
    for row, i in ((row, i) for row in range(batch) for i in at):
        t = chunk.lengths[row] + i
        kv = [seen(side, exact, step, row, t) for side, exact in zip((keys, values), exacts, strict=True)]
        oracle.append(softmax_attention(query[row, :, i].double(), *kv, scale))
        plain.append(softmax_attention(query[row, :, i], *(x.to(chunk.dtype) for x in kv), scale))
    ours, wanted = ours[:, at].flatten(0, 1), torch.stack(oracle)
    return _relative(ours, wanted), _relative(torch.stack(plain), wanted)
