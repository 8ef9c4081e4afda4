"""What the codecs share about scales: sums that do not depend on the batch, matched norms, and safe fp16."""

from __future__ import annotations

import math

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


def root(x: torch.Tensor) -> torch.Tensor:
    """The square root of float32, rounded as IEEE 754 says.

    PyTorch's own on a CPU is not (measured, 2.13 with MKL: one result in six is the neighbour), so that the compiled
    encoder and another machine would store other bytes.
    """
    return x.double().sqrt().float()


def to_scale(scale: torch.Tensor) -> torch.Tensor:
    """Non-negative float32 scales as float16: saturated at 65504, so that finite stays finite; NaN stays NaN."""
    return scale.clamp(max=LARGEST_SCALE).half()


def spread_out(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Float32 [..., n] as coordinates of unit variance; its largest magnitude; its norm over that (both [..., 1]).

    NaN throughout for vectors of zeros and those that are not finite.
    """
    # Against its largest magnitude a vector's squares neither overflow nor vanish; NaN and infinity become NaN.
    peak = x.abs().amax(-1, keepdim=True)
    unit = x / torch.where(peak > 0, peak, 1.0)
    norm = root(tree_sum(unit * unit))
    return unit * (math.sqrt(x.shape[-1]) / norm), peak, norm


def matched_scale(chosen: torch.Tensor, peak: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """The fp16 scale that gives ``chosen`` [..., n] the norm of the vector that ``spread_out`` took apart."""
    return to_scale(peak * (norm / root(tree_sum(chosen * chosen))))
