"""Encoding by trellis on the GPU: what surrounds the search of ``encode.py``."""

from __future__ import annotations

import functools

import torch
import triton

from turbomoe.kv.codecs.scales import root, spread_out, to_scale
from turbomoe.kv.kernels import encode as kernel
from turbomoe.kv.kernels.checked import failure
from turbomoe.kv.kernels.encode_assembly import THREADS, kept
from turbomoe.kv.kernels.encode_step import PLANS
from turbomoe.kv.kernels.stored import processors
from turbomoe.kv.trellis_codebook import Trellis, codebook
from turbomoe.kv.trellis_fixed import to_halves
from turbomoe.kv.trellis_search import HALF_SPAN
from turbomoe.notices import Notice, board

WARPS = 8  # of one processor at a time: enough to hide waiting, and what they note fills no more memory than that


def encode(x: torch.Tensor, trellis: Trellis, asm: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors [..., head_dim] to codes uint8 [..., bytes] and scales float16 [..., 1], as ``TrellisCodec.encode``.

    The codes are those of ``trellis_fixed.search_fixed``. Without ``asm`` by its plain twin.
    """
    spread, peak, norm = spread_out(x.float())
    rows = spread.reshape(-1, x.shape[-1]).nan_to_num(nan=0.0)
    codes, squares = search(rows, trellis, asm)
    scales = to_scale(peak * (norm / root(squares).view(peak.shape)))
    return codes.view(*x.shape[:-1], codes.shape[-1]), scales


def search(spread: torch.Tensor, trellis: Trellis, asm: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 [n, head_dim] of unit variance to codes uint8 [n, bytes] and the sum of their squares, float32 [n].

    Scratch memory is bounded, whatever n is: up to 0.9 GB on a GPU of 132 processors.
    """
    n, dim = spread.shape
    steps, device, each = dim // trellis.values, spread.device, kernel.VECTORS
    x = _columns(spread, trellis)
    codes = torch.empty(n, steps * trellis.step_bits // 32, dtype=torch.int32, device=device)
    squares = torch.empty(n, dtype=torch.float32, device=device)
    programs = min(triton.cdiv(max(n, 1), each), WARPS * processors(device))
    room = programs * max(steps, 2 * HALF_SPAN) * kept(trellis).words * THREADS
    scratch = torch.empty(room, dtype=torch.int32, device=device)
    where = x, codebook(trellis, str(device)), scratch, codes, squares
    for first in range(0, n, programs * each):
        grid = min(programs, triton.cdiv(n - first, each))
        kernel.search[(grid,)](
            *where, first, n, x.shape[1], steps, trellis.name, PLANS[trellis.name].version, ASM=asm, num_warps=1
        )
    return codes.view(torch.uint8), squares


def _columns(spread: torch.Tensor, trellis: Trellis) -> torch.Tensor:
    """What the kernel reads, for whole programs: int32 [head_dim, vectors / 2], two float16 in each."""
    n, dim = spread.shape
    x = torch.zeros(
        dim, triton.cdiv(max(n, 1), kernel.VECTORS) * kernel.VECTORS, dtype=torch.float16, device=spread.device
    )
    x[:, :n] = to_halves(spread, trellis).t()
    return x.view(torch.int32)


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
