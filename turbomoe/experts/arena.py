"""Where blobs live: one uint8 matrix of equal rows, aligned, zero-filled, never moved."""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch

from turbomoe.errors import OutOfMemoryError

ALIGN = 64  # one cache line, and the widest CPU vector
TAIL = 512  # kernels that read whole vectors may run past the last row


def pad(nbytes: int) -> int:
    """``nbytes`` rounded up to ``ALIGN``."""
    return -(-nbytes // ALIGN) * ALIGN


def allocate(rows: int, row_bytes: int, device: torch.device) -> torch.Tensor:
    """A zero-filled uint8 arena [rows, row_bytes] on ``device`` whose base is a multiple of ``ALIGN``.

    Host arenas are fresh pages of the system, so memory is taken when a row is first written. Raises
    ``OutOfMemoryError``.
    """
    nbytes = rows * row_bytes + TAIL
    try:
        flat = _host(nbytes) if device.type == "cpu" else torch.zeros(nbytes, dtype=torch.uint8, device=device)
    except (OSError, OverflowError, MemoryError, torch.OutOfMemoryError) as error:
        raise OutOfMemoryError(
            f"Cannot take {nbytes / 2**30:.2f} GiB for experts on {device}",
            why=str(error).splitlines()[0],
            fix="Use a smaller model or quantisation, or lower --moe-cache",
        ) from error
    return flat[: rows * row_bytes].view(rows, row_bytes)


def _host(nbytes: int) -> torch.Tensor:
    # Private, because Python's default is a shared mapping, for which kernels ignore the advice below.
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # an expert is megabytes read in one sweep: fewer TLB misses
        with suppress(OSError):  # a kernel built without huge pages refuses the advice and is right to
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)
