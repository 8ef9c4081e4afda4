"""The routing of one step, gathered on the device and read by the host once, when the step has ended."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from turbomoe.errors import IntegrityError


class RoutingLog:
    """Ids of every layer of a step: one int32 buffer [layers, rows, k] that only grows."""

    def __init__(self, layers: int, top_k: int, device: torch.device) -> None:
        self._ids = torch.empty((layers, 0, top_k), dtype=torch.int32, device=device)
        self._rows = np.zeros(layers, dtype=np.int64)

    def clear(self) -> None:
        """Forget the last step."""
        self._rows[:] = 0

    def record(self, position: int, ids: torch.Tensor) -> None:
        """Keep ``ids`` [rows, k] of the layer at ``position``, which runs at most once a step. Does not wait."""
        rows, k = ids.shape
        if k != self._ids.shape[2]:
            raise IntegrityError(
                f"A layer routed to {k} experts a row where the cache was built for {self._ids.shape[2]}"
            )
        if self._rows[position]:
            raise IntegrityError(f"The expert layer at position {position} ran twice in one step")
        self._grow(rows)
        self._ids[position, :rows].copy_(ids)
        self._rows[position] = rows

    def take(self) -> npt.NDArray[np.int32]:
        """The step's ids [layers, rows, k] on the host, -1 where a layer had fewer rows. Waits for the device."""
        rows = int(self._rows.max())
        ids: npt.NDArray[np.int32] = self._ids[:, :rows].cpu().numpy().copy()
        ids[np.arange(rows) >= self._rows[:, None]] = -1
        return ids

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self._ids.nbytes

    def _grow(self, rows: int) -> None:
        layers, capacity, k = self._ids.shape
        if rows <= capacity:
            return
        with torch.inference_mode(False):  # or it could not be written to by a pass outside inference mode
            grown = self._ids.new_empty((layers, rows, k))
        grown[:, :capacity] = self._ids
        self._ids = grown
