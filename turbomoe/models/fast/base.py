"""The contract of a fast body: all decoder layers of a model in one plain loop, without transformers' modules.

The stock shell keeps what runs once a token: embedding, final norm, output head. A body reads the shell's weights and
never copies them whole; it has no state of its own, so any number of memories can run through one.
"""

from __future__ import annotations

from typing import Protocol

import torch

from turbomoe.kv.cache import KVCache
from turbomoe.kv.layer import Step


class Body(Protocol):
    """The decoder layers of one model."""

    def run(self, hidden: torch.Tensor, step: Step, memory: KVCache) -> torch.Tensor:
        """Run the open ``step`` of ``memory`` through all layers.

        hidden [B, step.count, hidden_size] in the model's dtype, embedded tokens; it may be overwritten. Returns the
        same shape, before the final norm. Keys, values and recurrent states are stored in ``memory`` on the way. No
        host synchronisation on a device, and shapes follow from B, ``step.count`` and ``step.reach`` alone.
        """
        ...
