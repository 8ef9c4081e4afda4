"""Where executors write: one buffer a layer and size of decode batch, at an address that never changes.

A recorded sequence of kernels (a CUDA graph) writes to the addresses it was recorded with. Batches share the buffer
of the next power of two, so that a layer keeps at most twice the bytes of its largest decode batch.
"""

from __future__ import annotations

from collections import Counter

import torch


class Outputs:
    """Buffers [rows, hidden] like the hidden states that they belong to, never freed, never moved."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[object, ...], torch.Tensor] = {}

    def like(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """The buffer of ``layer`` for as many rows as ``hidden`` [rows, H]: valid until the layer runs again."""
        rows, width = hidden.shape
        capacity = 1 << max(rows - 1, 0).bit_length()
        key = (layer, capacity, width, hidden.dtype, hidden.device)
        if key not in self._buffers:
            with torch.inference_mode(False):  # or its reader could not add to it in place outside inference mode
                self._buffers[key] = hidden.new_empty((capacity, width))
        return self._buffers[key][:rows]

    def nbytes(self) -> Counter[str]:
        """Bytes held by device."""
        held: Counter[str] = Counter()
        for buffer in self._buffers.values():
            held[str(buffer.device)] += buffer.nbytes
        return held
