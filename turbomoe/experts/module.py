"""The module that stands where a model's routed experts were: no parameters, all work in the runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from turbomoe.errors import IntegrityError

if TYPE_CHECKING:
    from turbomoe.experts.runtime import ExpertRuntime


class StoreExperts(nn.Module):
    """Routed experts of decoder layer ``layer``, computed by a shared ``ExpertRuntime``."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self._runtime: ExpertRuntime | None = None

    def bind(self, runtime: ExpertRuntime) -> None:
        """Connect to the runtime that holds this layer's experts."""
        self._runtime = runtime

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of the routed experts: [T, H], ids [T, K], weights [T, K] -> [T, H] in the input's dtype."""
        if self._runtime is None:
            raise IntegrityError(f"The experts of layer {self.layer} were called before a runtime was bound")
        return self._runtime.run(self.layer, hidden_states, top_k_index, top_k_weights)
