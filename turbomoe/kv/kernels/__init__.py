"""Kernels of the KV cache in Triton, and the one place that picks between them and their PyTorch references."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from turbomoe.kv.decode import attend_one as reference
from turbomoe.kv.layer import Side, Step
from turbomoe.kv.prefill import attend_block as prefill_reference
from turbomoe.notices import Notice, board

QUERIES = 16  # of a KV head: what one product takes
HEAD_SIZES = (64, 128, 256)
Attend = Callable[..., torch.Tensor]


def unsupported(head_dim: int, group: int, dtype: torch.dtype = torch.bfloat16) -> str:
    """Why the kernels do not run heads of this shape; empty when they do."""
    if head_dim not in HEAD_SIZES:
        return f"its heads have {head_dim} values, and the kernels know {', '.join(map(str, HEAD_SIZES))}"
    if group > QUERIES:
        return f"it has {group} query heads for each KV head, and the kernels take {QUERIES}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in {dtype}, and the kernels in half precision"
    return ""


@cache
def decode_attention(device: str, head_dim: int, group: int, dtype: torch.dtype) -> Attend:
    """Attention of one new token a sequence for layers of this shape, on this type of device, in this precision."""
    if device != "cuda":
        return reference
    if why := unsupported(head_dim, group, dtype):
        board.post(Notice("this model's attention runs without its GPU kernels", why, "attention takes longer"))
        return reference
    from turbomoe.kv.kernels.launch import attend_one

    return attend_one


@cache
def prefill_attention(device: str, head_dim: int, group: int, dtype: torch.dtype, wide: bool) -> Attend:
    """Attention of a block of new tokens; see ``decode_attention``. ``wide`` tells that windows are in float32."""
    if device != "cuda":
        return prefill_reference
    if wide:
        board.post(Notice("prompts are read without the GPU kernel", "the cache is in float32", "prefill takes longer"))
        return prefill_reference
    if unsupported(head_dim, group, dtype):  # decode_attention has said so
        return prefill_reference
    from turbomoe.kv.kernels.checked import Checked
    from turbomoe.kv.kernels.prefill_launch import attend_block

    return Checked("prompts", attend_block, prefill_reference, _prefill_kind)


def _prefill_kind(
    query: torch.Tensor, first: int, exact_k: torch.Tensor, exact_v: torch.Tensor, keys: Side, values: Side, step: Step,
    scale: float,
) -> tuple[str, str, bool]:  # fmt: skip
    """Types of keys and values, and whether pages are read."""
    names = tuple("" if side.codec is None else side.codec.name for side in (keys, values))
    return names[0], names[1], step.reach > keys.sink + keys.recent + step.count
