"""Softmax over keys that arrive tile by tile: the running maximum, the running sum, the weighted values.

Values live in one of two domains: plain, and rotated (as a rotated codec decodes them). Each has its own
accumulator and they meet once at the end, so un-rotating costs one vector a query, not one a key.
Source: Milakov & Gimelshein 2018, "Online normalizer calculation for softmax".
"""

from __future__ import annotations

import torch


class OnlineSoftmax:
    """State for queries [B, kv_heads, rows, head_dim], all float32. ``add`` takes any number of key tiles."""

    def __init__(self, queries: torch.Tensor) -> None:
        self.top = queries.new_full(queries.shape[:-1], float("-inf"))
        self.total = torch.zeros_like(self.top)
        self.coded_total = torch.zeros_like(self.top)
        self.plain = torch.zeros_like(queries)
        self.rotated = torch.zeros_like(queries)

    def add(self, scores: torch.Tensor, values: torch.Tensor, *, coded: bool, rotated: bool) -> None:
        """Take in one tile: scores [B, kv_heads, rows, keys] (-inf where masked), values [B, kv_heads, keys, head_dim].

        ``coded`` tells that the values lack their mean; ``rotated`` that they are in the rotated domain.
        """
        top = torch.maximum(self.top, scores.amax(-1))
        # A row that has seen no key yet keeps -inf; subtracting it from itself would give NaN.
        safe = top.masked_fill(top == float("-inf"), 0.0)
        shrink = torch.exp(self.top - safe)
        weights = torch.exp(scores - safe[..., None])
        share = weights.sum(-1)
        self.total = self.total * shrink + share
        self.coded_total = self.coded_total * shrink + (share if coded else 0.0)
        self.plain *= shrink[..., None]
        self.rotated *= shrink[..., None]
        (self.rotated if rotated else self.plain).add_(weights @ values)
        self.top = top
