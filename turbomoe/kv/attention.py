"""Attention of new queries over exact windows and pages of codes, in one softmax and without a copy of the past.

What is new is stored first; then ``decode.py`` or ``prefill.py`` attends, or their kernels.
"""

from __future__ import annotations

import torch

from turbomoe.kv.kernels import decode_attention, prefill_attention
from turbomoe.kv.layer import Side, Step


def query_block(device: str) -> int:
    """Queries at a time on that type of device.

    On a CPU scores should stay in its caches, and a small block skips more of what is not seen yet: 512 tokens of
    SmolLM2 take 1.6 times as long in blocks of 512 as in blocks of 64, and 50 MiB more.
    """
    return 64 if device == "cpu" else 512


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keys: Side, values: Side, step: Step, scale: float
) -> torch.Tensor:
    """Store the new keys and values, then attend.

    query [B, query_heads, S, head_dim]; key, value [B, kv_heads, S, head_dim]; all post-RoPE.
    Returns float32 [B, S, query_heads, head_dim].
    """
    shape = (query.device.type, query.shape[-1], query.shape[1] // key.shape[1], query.dtype)
    if step.count == 1:
        return decode_attention(*shape)(query, key, value, keys, values, step, scale)
    key, value = key.to(keys.exact_dtype), value.to(values.exact_dtype)
    exact_k, exact_v = (torch.cat([side.past(step), new], 2) for side, new in ((keys, key), (values, value)))
    for side, new, exact in ((keys, key, exact_k), (values, value, exact_v)):
        side.keep_sinks(new, step)
        side.store(exact[:, :, : step.count], step)
        side.keep_recent(new, step)
    rows = query_block(query.device.type)
    attend_block = prefill_attention(*shape, torch.float32 in (keys.exact_dtype, values.exact_dtype))
    blocks = [
        attend_block(query[:, :, i : i + rows], i, exact_k, exact_v, keys, values, step, scale)
        for i in range(0, step.count, rows)
    ]
    return torch.cat(blocks, 1) if len(blocks) > 1 else blocks[0]
