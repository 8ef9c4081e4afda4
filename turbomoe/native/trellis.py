"""Encoding by trellis in the C core (``native/src/trellis.h``): bit for bit what the search in PyTorch finds."""

from __future__ import annotations

import ctypes

import torch

from turbomoe.native.library import Core, CTrellis, check_status
from turbomoe.native.shared import opened_pool

KINDS = {"tcq2": 0, "tcq2.5": 1, "tcq3": 2, "tcq4": 3}


def encode(
    core: Core, name: str, x: torch.Tensor, codebook: torch.Tensor, by_dropped: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 vectors [..., dim] on the CPU to codes uint8 [..., width] and scales float16 [..., 1].

    ``codebook`` float32 [values, states] and ``by_dropped`` [values, dropped bits, groups] hold the same values. All
    workers of the process's pool compute, the caller alone where none is open.
    """
    x = x.contiguous()
    codes = torch.empty(*x.shape[:-1], width, dtype=torch.uint8)
    scales = torch.empty(*x.shape[:-1], 1, dtype=torch.float16)
    addresses = [t.data_ptr() for t in (x, codebook, by_dropped, codes, scales)]
    pool = opened_pool()
    job = CTrellis(KINDS[name], x.shape[-1], *addresses)
    check_status(core.trellis_encode(pool and pool.handle, ctypes.byref(job), scales.numel()))
    return codes, scales
