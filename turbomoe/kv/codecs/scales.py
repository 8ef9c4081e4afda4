"""What the codecs share about scales: a sum that does not depend on the batch, and safe fp16."""

from __future__ import annotations

import torch

LARGEST_SCALE = 65504.0  # largest finite fp16


def tree_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last axis (a power of two) by halves: [..., n] to [..., 1].

    Elementwise additions in a fixed order, so the bits of the sum depend on the vector alone.
    """
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x


def to_scale(scale: torch.Tensor) -> torch.Tensor:
    """Non-negative float32 scales as float16: saturated at 65504, so that finite stays finite; NaN stays NaN."""
    return scale.clamp(max=LARGEST_SCALE).half()
