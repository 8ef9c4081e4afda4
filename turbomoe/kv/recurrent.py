"""The state of a linear-attention layer (Gated DeltaNet), one row a sequence slot: it has no length to page."""

from __future__ import annotations

import torch

from turbomoe.kv.shape import RecurrentShape


class RecurrentState:
    """conv [slots, channels, kernel] in the model's dtype, state [slots, heads, key_dim, value_dim] in float32.

    A slot that has seen nothing is all zeros, which is exactly how the layer starts.
    """

    def __init__(self, shape: RecurrentShape, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self.conv = torch.zeros(slots, *shape.conv, dtype=dtype, device=device)
        self.state = torch.zeros(slots, *shape.state, dtype=torch.float32, device=device)

    def nbytes(self) -> int:
        return self.conv.nbytes + self.state.nbytes

    def clear(self, slot: int) -> None:
        self.conv[slot] = 0
        self.state[slot] = 0

    def read(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the rows of ``slots`` (int64 [B])."""
        return self.conv[slots], self.state[slots]

    def write(self, slots: torch.Tensor, conv: torch.Tensor, state: torch.Tensor) -> None:
        """Store the rows after a step."""
        self.conv[slots] = conv.to(self.conv.dtype)
        self.state[slots] = state.to(self.state.dtype)
