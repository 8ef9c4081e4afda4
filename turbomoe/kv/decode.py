"""Attention of one new token a sequence: the direct path of decoding.

The rule, the codes and the exact windows are those of ``attention``. With one query a sequence all scores are small, so
they are computed first and meet in one softmax; then the values are read. Pages stay page-major: nothing is reordered,
and float32 pages that lie side by side are not even copied.
"""

from __future__ import annotations

import torch

from turbomoe.kv.layer import Side, Step
from turbomoe.kv.pages import PAGE_TOKENS, pages_for
from turbomoe.kv.turns import page_scores

TILE_PAGES = 32


def attend_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keys: Side, values: Side, step: Step, scale: float
) -> torch.Tensor:
    """``attention.attend`` for ``step.count`` 1: float32 [B, 1, query_heads, head_dim].

    What leaves the ring in this step was copied out when the step began, to be encoded aside (``group.SideGroup``).
    """
    batch, heads, _, dim = query.shape
    q = (query.float() * scale).reshape(batch, key.shape[1], -1, dim)
    key, value = key.to(keys.exact_dtype), value.to(values.exact_dtype)
    # Without windows exact pages hold every token, the new one too; else the new one stands beside its windows.
    paged = keys.is_exact and values.is_exact
    windows = None if paged else (keys.windows(key, step).float(), values.windows(value, step).float())
    for side, new in ((keys, key), (values, value)):
        side.keep(new, step)
    tiles = _tiles(step, keys, paged)
    scores = [] if windows is None else [q @ windows[0].mT]
    if tiles:
        scores += _code_scores(q, keys, step, tiles)
    return _mix(torch.cat(scores, -1), windows, values, step, tiles, paged).reshape(batch, 1, heads, dim)


def _tiles(step: Step, keys: Side, paged: bool) -> list[tuple[int, int]]:
    """Page ranges that hold what any sequence sees from pages."""
    if keys.codec is None:
        return []
    pages = pages_for(step.reach if paged else step.reach - 1 - keys.recent - keys.sink)
    return [(first, min(first + TILE_PAGES, pages)) for first in range(0, pages, TILE_PAGES)]


def _code_scores(
    q: torch.Tensor, keys: Side, step: Step, tiles: list[tuple[int, int]]
) -> list[torch.Tensor]:  # fmt: skip
    """Scores against the pages of each tile: [B, kv_heads, group, keys]."""
    plain, q = q, (keys.spread(q) @ keys.rotation() if keys.rotated else q).unsqueeze(1)
    found = []
    for first, last in tiles:
        k, scales = keys.tile(step, first, last)
        scores = q @ k.mT
        scores = (scores if scales is None else scores.mul_(scales)).permute(0, 2, 3, 1, 4)
        if keys.mean is not None:
            # A key is its code plus the mean, so the mean's score is one number a query and page.
            assert keys.turns is not None
            scores = scores + page_scores(plain, keys.mean, keys.turns[first:last])[..., None]
        found.append(scores.flatten(3))
    return found


def _mix(
    scores: torch.Tensor, windows: tuple[torch.Tensor, torch.Tensor] | None, values: Side, step: Step,
    tiles: list[tuple[int, int]], paged: bool,
) -> torch.Tensor:  # fmt: skip
    """The values, weighted by the softmax of scores [B, kv_heads, group, keys]: [B, kv_heads, group, head_dim]."""
    key = ("hidden", values.sink, values.recent, paged, bool(tiles))
    hidden = step.once(key, lambda: _hidden(step, values, tiles, paged))
    weights = scores.masked_fill_(hidden, float("-inf")).softmax(-1)
    # Rows that a sequence does not see may be another's; a lone one's were wiped, and its pages are read in place.
    silent = None if step.lone is not None else hidden
    if windows is None:
        return _read(weights, values, step, tiles, silent)
    size = windows[1].shape[2]
    out = weights[..., :size] @ windows[1]
    if not tiles:
        return out
    coded = weights[..., size:]
    far = _read(coded, values, step, tiles, None if silent is None else silent[..., size:])
    if values.rotated:
        far = far @ values.rotation().t()
    if values.mean is not None:
        far = torch.addcmul(far, coded.sum(-1, keepdim=True), values.mean[:, None, :])
    return out.add_(far)


def _read(
    weights: torch.Tensor, values: Side, step: Step, tiles: list[tuple[int, int]], silent: torch.Tensor | None
) -> torch.Tensor:
    """Pages weighted by [B, kv_heads, group, keys]: [B, kv_heads, group, head_dim], in the order of ``tile``.

    ``silent`` bool [B, 1, 1, keys]: rows to be left out even if they hold NaN, which a weight of 0 would not silence.
    """
    paged = _by_page(weights)
    silent = None if silent is None else _by_page(silent)
    sums = []
    for first, last in tiles:
        v, scales = values.tile(step, first, last)
        part = paged[:, first:last] if scales is None else paged[:, first:last] * scales
        if silent is not None and scales is not None:
            part.masked_fill_(silent[:, first:last], 0.0)
        elif silent is not None:
            v.masked_fill_(silent[:, first:last].mT, 0.0)
        sums.append((part @ v).sum(1))
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)


def _by_page(x: torch.Tensor) -> torch.Tensor:
    """[B, heads, rows, keys] -> [B, pages, heads, rows, PAGE_TOKENS]"""
    return x.view(*x.shape[:-1], -1, PAGE_TOKENS).permute(0, 3, 1, 2, 4)


def _hidden(step: Step, side: Side, tiles: list[tuple[int, int]], paged: bool) -> torch.Tensor:
    """Which keys are not seen, bool [B, 1, 1, keys]: sinks, ring, new token, pages.

    The new token is not counted among the sinks; ring row r holds the last position that is r modulo ``recent``.
    """
    device, t = step.starts.device, step.starts[:, None]
    index = torch.arange(PAGE_TOKENS * (tiles[-1][1] if tiles else 0), device=device)
    if paged:
        return (index > t)[:, None, None, :]
    sinks, ring = torch.arange(side.sink, device=device), torch.arange(side.recent, device=device)
    position = t - 1 - (t - 1 - ring).remainder(max(1, side.recent))
    parts = (sinks >= t, position < side.sink, t < 0, index >= t - side.recent - side.sink)
    return torch.cat(parts, 1)[:, None, None, :]
