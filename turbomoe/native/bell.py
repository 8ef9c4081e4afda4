"""Starting kernel calls by a flag in memory, as a GPU kernel in a CUDA graph can, without any Python thread awake."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence

import torch

from turbomoe.native.kernels import ExpertsKernel, LinearKernel
from turbomoe.native.library import CBell, CErrand, CExpertsCall, CLinearCall, NativeError
from turbomoe.native.pool import HOT_US, WorkerPool

BELL_BYTES = ctypes.sizeof(CBell)
# Byte offsets of the words that a device touches: all uint32 but the status, which is int32.
RING, ERRAND, ANSWER, STATUS = CBell.ring.offset, CBell.errand.offset, CBell.answer.offset, CBell.status.offset


class Bell:
    """A thread that runs prepared kernels when a device rings.

    ``memory`` is zeroed uint8 [128], 64-byte aligned (pinned, where a GPU rings). To ring: write the number of a
    kernel to ``ERRAND``, make it visible, then a new number to ``RING``; the work is done when ``ANSWER`` has that
    number, and ``STATUS`` is 0 if it was accepted. Kernels must have been ``prepare``d with tensors that stay.
    """

    def __init__(
        self,
        pool: WorkerPool,
        memory: torch.Tensor,
        kernels: Sequence[ExpertsKernel | LinearKernel],
        hot_us: int = HOT_US,
    ) -> None:
        if memory.numel() != BELL_BYTES or memory.data_ptr() % 64 or memory.dtype != torch.uint8:
            raise NativeError(f"A bell is {BELL_BYTES} bytes of uint8, 64-byte aligned")
        self._keep = (pool, memory, tuple(kernels))
        self._errands = (CErrand * len(kernels))(*[_errand(pool, kernel) for kernel in kernels])
        server = pool.core.bell_start(memory.data_ptr(), self._errands, len(kernels), hot_us)
        if not server:
            raise NativeError("The bell has no thread", why="the system refused to start one")
        self.close = weakref.finalize(self, pool.core.bell_stop, server)


def _errand(pool: WorkerPool, kernel: ExpertsKernel | LinearKernel) -> CErrand:
    experts = isinstance(kernel, ExpertsKernel)
    run = pool.core.experts_run if experts else pool.core.linear_run
    struct: type[ctypes.Structure] = CExpertsCall if experts else CLinearCall
    status = kernel.address + struct.status.offset
    return CErrand(ctypes.cast(run, ctypes.c_void_p), kernel.address, status)
