"""How ggml rounds activations before its integer dot products, as facts of its formats, for error comparisons.

Blocks of 32 with fp16 scales (Q8_0, Q8_1) meet formats with blocks of 32; blocks of 256 with float scales (Q8_K), where
the value of largest magnitude maps to -127, meet K formats.
"""

from __future__ import annotations

import torch

from turbomoe.native.layout import FORMATS


def ggml_activations(x: torch.Tensor, weight_format: str) -> torch.Tensor:
    """float32 [tokens, cols] as ggml's kernel for ``weight_format`` sees it."""
    if FORMATS[weight_format].block == 256:
        groups = x.unflatten(-1, (-1, 256))
        peak = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        inverse = -127.0 / peak
        return ((groups * inverse).round().clamp(max=127) / inverse).flatten(-2)
    groups = x.unflatten(-1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return ((groups / scale).round() * scale.half().float()).flatten(-2)
