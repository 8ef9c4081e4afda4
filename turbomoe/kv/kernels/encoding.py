"""Encoding by trellis on the GPU: what surrounds the search of ``encode.py``."""

from __future__ import annotations

import functools

import torch
import triton

from turbomoe.kv.codecs.scales import root, to_scale
from turbomoe.kv.kernels import encode as kernel
from turbomoe.kv.kernels.checked import failure
from turbomoe.kv.kernels.encode_assembly import THREADS, kept
from turbomoe.kv.kernels.encode_input import columns
from turbomoe.kv.kernels.encode_step import PLANS
from turbomoe.kv.kernels.stored import processors
from turbomoe.kv.trellis_codebook import Trellis, codebook
from turbomoe.kv.trellis_search import HALF_SPAN
from turbomoe.notices import Notice, board

WARPS = 8  # of one processor at a time: enough to hide waiting, and what they note fills no more memory than that


def encode(x: torch.Tensor, trellis: Trellis, asm: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors [..., head_dim] to codes uint8 [..., bytes] and scales float16 [..., 1], as ``TrellisCodec.encode``.

    The codes are those of ``trellis_fixed.search_fixed``. Without ``asm`` by its plain twin.
    """
    dim = x.shape[-1]
    read, peaks, norms = columns(x.reshape(-1, dim), trellis)
    codes, squares = search(read, len(peaks), trellis, asm)
    scales = to_scale(peaks * (norms / root(squares)))
    return codes.view(*x.shape[:-1], codes.shape[-1]), scales.view(*x.shape[:-1], 1)


def search(
    columns: torch.Tensor, n: int, trellis: Trellis, asm: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """What ``encode_input.columns`` makes of n vectors to codes uint8 [n, bytes] and the sum of their squares, float32
    [n].

    Scratch memory is bounded, whatever n is: up to 0.9 GB on a GPU of 132 processors.
    """
    steps, device, each = len(columns) // trellis.values, columns.device, kernel.VECTORS
    codes = torch.empty(n, steps * trellis.step_bits // 32, dtype=torch.int32, device=device)
    squares = torch.empty(n, dtype=torch.float32, device=device)
    programs = min(triton.cdiv(max(n, 1), each), WARPS * processors(device))
    room = programs * max(steps, 2 * HALF_SPAN) * kept(trellis).words * THREADS
    scratch = torch.empty(room, dtype=torch.int32, device=device)
    where = columns, codebook(trellis, str(device)), scratch, codes, squares
    for first in range(0, n, programs * each):
        grid = min(programs, triton.cdiv(n - first, each))
        kernel.search[(grid,)](
            *where, first, n, columns.shape[1], steps, trellis.name, PLANS[trellis.name].version, ASM=asm, num_warps=1
        )
    return codes.view(torch.uint8), squares


@functools.cache
def passes(name: str, head_dim: int, device: torch.device) -> bool:
    """Whether the kernel has encoded 64 Gaussian vectors here as well as the reference, to 2% of the error.

    Asked once a process, before its first use: compilers and GPUs differ, and wrong codes would show in no error.
    """
    from turbomoe.kv.codecs.trellis import TrellisCodec

    codec = TrellisCodec(name, head_dim)
    x = torch.randn(64, head_dim, generator=torch.Generator().manual_seed(1)).to(device)
    try:
        found, expected = (codec.decode(planes) for planes in (encode(x, codec.trellis), codec.encode_plainly(x)))
        errors = [float((values - x).square().sum()) for values in (found, expected)]
        why = "" if errors[0] <= 1.02 * errors[1] else f"its error is {errors[0] / errors[1]:.2f} times the reference's"
    except Exception as error:  # compilers and drivers raise what they like
        why = failure(error)
    if why:
        board.post(Notice(f"the GPU encoder of {name} is not used", why, "encoding takes far longer"))
    return not why
