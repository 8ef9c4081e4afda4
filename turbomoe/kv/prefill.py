"""Attention of a block of new tokens over exact windows and pages of codes, in one softmax.

This is the PyTorch reference of ``kernels/prefill.py``: the same tiles, the same masks, float32 sums.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from turbomoe.kv.layer import Side, Step
from turbomoe.kv.pages import PAGE_TOKENS
from turbomoe.kv.softmax import OnlineSoftmax
from turbomoe.kv.turns import page_scores

TILE_PAGES = 8


def attend_block(
    query: torch.Tensor, first: int, exact_k: torch.Tensor, exact_v: torch.Tensor, keys: Side, values: Side,
    step: Step, scale: float,
) -> torch.Tensor:  # fmt: skip
    """Attention of the chunk's queries ``first`` and on: query [B, query_heads, rows, head_dim].

    exact_k, exact_v [B, kv_heads, recent + S, head_dim]: the ring in order of position, then the whole chunk.
    Returns float32 [B, rows, query_heads, head_dim].
    """
    batch, heads, rows, dim = query.shape
    kv_heads = exact_k.shape[1]
    group = heads // kv_heads
    q = (query.float() * scale).reshape(batch, kv_heads, group * rows, dim)
    at = (step.starts[:, None] + first + torch.arange(rows, device=q.device)).repeat(1, group)
    state = OnlineSoftmax(q)
    _add_sinks(state, q, at, keys, values, step)
    _add_recent(state, q, at, first, rows, exact_k, exact_v, keys, step)
    if keys.codec is not None:
        _add_codes(state, q, at, first + rows, keys, values, step)
    out = _finish(state, values)
    return out.reshape(batch, kv_heads, group, rows, dim).permute(0, 3, 1, 2, 4).reshape(batch, rows, heads, dim)


def _add_sinks(state: OnlineSoftmax, q: torch.Tensor, at: torch.Tensor, keys: Side, values: Side, step: Step) -> None:
    if keys.sink == 0:
        return
    positions = torch.arange(keys.sink, device=q.device)
    _add_exact(state, q, at[..., None] >= positions, keys.sinks[step.slots], values.sinks[step.slots])


def _add_recent(
    state: OnlineSoftmax, q: torch.Tensor, at: torch.Tensor, first: int, rows: int, exact_k: torch.Tensor,
    exact_v: torch.Tensor, keys: Side, step: Step,
) -> None:  # fmt: skip
    window = slice(first, first + rows + keys.recent)
    positions = step.starts[:, None] - keys.recent + torch.arange(window.start, window.stop, device=q.device)
    positions, t = positions[:, None, :], at[..., None]
    visible = (positions <= t) & (positions >= t - keys.recent) & (positions >= keys.sink)
    _add_exact(state, q, visible, exact_k[:, :, window], exact_v[:, :, window])


def _add_exact(state: OnlineSoftmax, q: torch.Tensor, visible: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    scores = q @ k.float().transpose(-1, -2)
    state.add(scores.masked_fill_(~visible[:, None], float("-inf")), v.float(), coded=False, rotated=False)


def _tiles(coded: int) -> Iterator[tuple[int, int]]:
    """Page ranges that cover ``coded`` tokens, ``TILE_PAGES`` at a time."""
    pages = -(-coded // PAGE_TOKENS)
    for first in range(0, pages, TILE_PAGES):
        yield first, min(first + TILE_PAGES, pages)


def _add_codes(
    state: OnlineSoftmax, q: torch.Tensor, at: torch.Tensor, upto: int, keys: Side, values: Side, step: Step
) -> None:
    coded = step.reach - step.count + upto - 1 - keys.recent - keys.sink
    if coded <= 0:
        return
    q_codes = keys.rotate(keys.spread(q)) if keys.rotated else q
    limit = (at - keys.recent - keys.sink)[:, None, :, None]
    stored = (step.starts + step.count - keys.recent - keys.sink)[:, None, None, None]
    for first, last in _tiles(coded):
        index = torch.arange(first * PAGE_TOKENS, last * PAGE_TOKENS, device=q.device)
        scores = q_codes @ keys.decode(step, first, last).transpose(-1, -2)
        if keys.mean is not None:
            # A key is its code plus the mean, so the mean's score is one number a query and page.
            assert keys.turns is not None
            offset = page_scores(q, keys.mean, keys.turns[first:last])
            scores = (scores.unflatten(-1, (-1, PAGE_TOKENS)) + offset[..., None]).flatten(-2)
        scores = scores.masked_fill_(index >= limit, float("-inf"))
        decoded = values.decode(step, first, last)
        if last * PAGE_TOKENS > step.floor + step.count - keys.recent - keys.sink:
            # Rows beyond a sequence's end belong to nobody: a weight of 0 would not silence a NaN there.
            decoded = decoded.masked_fill(index[:, None] >= stored, 0.0)
        state.add(scores, decoded, coded=True, rotated=values.rotated)


def _finish(state: OnlineSoftmax, values: Side) -> torch.Tensor:
    out = state.plain
    if values.rotated:
        out = out + values.unrotate(state.rotated)
    if values.mean is not None:
        out = out + state.coded_total[..., None] * values.mean[:, None, :]
    return out / state.total[..., None]
