"""Means of keys that the rotary embedding turns: one vector a head, turned to where each page begins.

A constant that a model adds to its keys (the k_proj bias of Qwen2 and Qwen2.5) comes out of the rotary embedding
turned by the position, R_p mu. Its average over a page of tokens is the same vector for every page, turned by the
page's first position: m_j = R_(start of j) u, with u the mean of R_o mu over the offsets o. Fast channels average to
nothing, slow ones are met exactly, however long the context. Pages count from the first coded token of a sequence.

Everything here is elementwise or on the query's side, so codes do not depend on the batch that they came in.
"""

from __future__ import annotations

import torch

from turbomoe.kv.pages import PAGE_TOKENS


def angles(frequencies: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Cosines, then sines, of positions [n] times frequencies [r] (radians a token): float32 [n, 2r]."""
    turns = positions.double()[:, None] * frequencies.double()
    return torch.cat((turns.cos(), turns.sin()), -1).float()


def page_turns(frequencies: torch.Tensor, sink: int, pages: int) -> torch.Tensor:
    """The angles by which the means of ``pages`` pages are turned: float32 [pages, 2r]. Page 0 begins at ``sink``."""
    return angles(frequencies, sink + PAGE_TOKENS * torch.arange(pages, device=frequencies.device))


def turn(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Turn x [..., head_dim] by angles [..., 2r], as rotary embeddings do: channel i with i + r, the rest stays."""
    r = turns.shape[-1] // 2
    if r == 0:
        return x
    cos, sin = turns[..., :r], turns[..., r:]
    a, b, rest = x[..., :r], x[..., r : 2 * r], x[..., 2 * r :]
    first, second = a * cos - b * sin, b * cos + a * sin
    return torch.cat((first, second, rest.expand(*first.shape[:-1], -1)), -1)


def page_scores(q: torch.Tensor, mean: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Dot products of queries with the means of pages.

    q [..., kv_heads, rows, head_dim], mean [kv_heads, head_dim] and turns [pages, 2r], all float32, to
    [..., kv_heads, rows, pages].
    A page costs 2r multiplications a query: what turns its mean is the same for all heads.
    """
    turning, still = waves(q, mean[:, None, :], turns.shape[-1] // 2)
    return turning @ turns.t() + still[..., None]


def waves(q: torch.Tensor, mean: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The query's side of ``page_scores``: what meets the angles of a page, [..., 2r], and what stays, [...]."""
    still = (q[..., 2 * r :] * mean[..., 2 * r :]).sum(-1)
    a, b = mean[..., :r], mean[..., r : 2 * r]
    qa, qb = q[..., :r], q[..., r : 2 * r]
    return torch.cat((qa * a + qb * b, qb * a - qa * b), -1), still
