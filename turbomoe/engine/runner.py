"""The model with its memory: one call runs new tokens of some slots and returns logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from turbomoe.config import KVSettings
from turbomoe.errors import ModelError
from turbomoe.experts.base import Phase
from turbomoe.kv.cache import KVCache
from turbomoe.kv.means import KVMeans
from turbomoe.models.base import LoadedModel

NOT_FINITE = "Check the file (a damaged download?), or use --dtype float32"


def check_finite(logits: torch.Tensor, model: LoadedModel) -> None:
    """Raise ``ModelError`` for logits that hold NaN or infinity."""
    if not logits.isfinite().all():
        raise ModelError(f"{model.name} computed numbers that are not finite", fix=NOT_FINITE)


class ModelRunner:
    """A loaded model and the memory of ``slots`` sequences of ``ctx_size`` tokens.

    ``measuring`` is for passes that serve nobody (calibration, evaluation): the expert cache does not learn from them.
    """

    def __init__(
        self, model: LoadedModel, kv: KVSettings, *, slots: int, ctx_size: int, means: KVMeans | None = None,
        measuring: bool = False,
    ) -> None:  # fmt: skip
        if means is not None and means.identity != model.identity:
            raise ModelError("These key and value means were calibrated for another model")
        self.model = model
        self._experts = None if measuring else model.experts
        device = next((parameter.device for parameter in model.shell.parameters()), torch.device("cpu"))
        self.memory = KVCache(
            model.layers, kv, slots=slots, ctx_size=ctx_size, dtype=model.dtype, device=device, means=means
        )

    @torch.inference_mode()
    def forward(self, slots: Sequence[int], ids: torch.Tensor, phase: Phase, keep: int = 1) -> torch.Tensor:
        """Run ids int64 [len(slots), S]; float logits of the last ``keep`` tokens (0: all) [len(slots), keep, vocab].

        Lengths advance only when the whole pass has succeeded. Raises ``ContextFullError`` before any
        sequence has changed.
        """
        from turbomoe.upstream.forward import forward

        self.memory.begin(slots, ids.shape[1])
        if self._experts is not None:
            self._experts.begin_step(phase)
        logits = forward(self.model.shell, ids.to(self.memory.device), self.memory, keep, self.model.body)
        self.memory.commit()
        if self._experts is not None:
            self._experts.end_step()
        return logits.float()
