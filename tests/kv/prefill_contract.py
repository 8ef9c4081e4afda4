"""The kernel contract (``contract.py``) for a block of new tokens: an oracle in float64 for some of its queries."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tests.kv.contract import Case, _relative, _whole, filled, fresh, softmax_attention
from turbomoe.kv.attention import query_block
from turbomoe.kv.layer import Side, Step


@dataclass(frozen=True)
class Chunk(Case):
    """``count`` new tokens of each sequence, after ``lengths``; ``looked_at`` of their queries are compared."""

    count: int = 70
    looked_at: int = 5


def seen(side: Side, exact: torch.Tensor, step: Step, row: int, t: int) -> torch.Tensor:
    """What the query at position t sees of sequence ``row``: float64 [kv_heads, t + 1, head_dim], in order.

    exact [B, kv_heads, recent + count, head_dim]: ring in order and chunk; call it after they have been stored.
    """
    start, slot = int(step.starts[row]), int(step.slots[row])
    parts = [side.sinks[slot][:, : min(t + 1, side.sink)].double()]
    coded = max(0, t - side.sink - side.recent)
    if coded and side.codec is not None:
        one = Step(
            step.slots[row : row + 1], step.starts[row : row + 1], step.pages[row : row + 1], 1, start, start + 1
        )
        parts.append(_decoded(side, one, coded))
    positions = torch.arange(min(t + 1, max(side.sink, t - side.recent)), t + 1, device=exact.device)
    parts.append(exact[row][:, positions - start + side.recent].double())
    return torch.cat(parts, 1)


def _decoded(side: Side, step: Step, count: int) -> torch.Tensor:
    codes = side.decode(step, 0, -(-count // 64))[0][:, :count]
    return _whole(side, side.unrotate(codes) if side.rotated else codes).double()


def stored_and_attended(query, key, value, keys: Side, values: Side, step: Step, scale: float, attend_block):
    """``attention.attend`` with this function for its blocks: (output, exact keys, exact values)."""
    key, value = key.to(keys.exact_dtype), value.to(values.exact_dtype)
    exacts = [torch.cat([side.past(step), new], 2) for side, new in ((keys, key), (values, value))]
    for side, new, exact in ((keys, key, exacts[0]), (values, value, exacts[1])):
        side.keep_sinks(new, step)
        side.store(exact[:, :, : step.count], step)
        side.keep_recent(new, step)
    size = query_block(query.device.type)
    blocks = [
        attend_block(query[:, :, i : i + size], i, *exacts, keys, values, step, scale)
        for i in range(0, step.count, size)
    ]
    return torch.cat(blocks, 1), *exacts


def errors(chunk: Chunk, attend_block, device: str) -> tuple[float, float]:
    """(kernel's, PyTorch's): the error relative to the oracle's norm, over some queries of all sequences."""
    cache = filled(chunk, device, chunk.count)
    batch, scale = len(chunk.lengths), chunk.head_dim**-0.5
    query, key, value = fresh(chunk, batch, chunk.count, torch.Generator().manual_seed(chunk.seed + 1), device)
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
