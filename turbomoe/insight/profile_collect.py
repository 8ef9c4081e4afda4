"""Gathers routing while a model runs, at the price of two small copies a layer, and sums it up block by block."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from turbomoe.errors import IntegrityError
from turbomoe.experts.base import Phase
from turbomoe.experts.residency import count_ids
from turbomoe.insight.profile import LAGS, RoutingStats
from turbomoe.insight.profile_model import RoutedModel
from turbomoe.insight.trace import DROP_PROMPT, END_PROMPT, PHASES, TraceRecorder

BLOCK = 64  # steps gathered before they are summed up: the sums cost little then, on a GPU one transfer
SAMPLE = 8  # every how many decode steps the next gate is tried: the copy of the layer's input is the dearest one

Ids = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


class RoutingProfiler:
    """An observer (``experts.base.RoutingObserver``) that sums up routing, and hands it to ``trace`` if there is one.

    ``gates`` has one weight [experts, hidden] per routed layer, or None where recall cannot be measured.
    ``half_life`` counts decode steps. Call ``finish`` for the sums.
    """

    def __init__(
        self,
        model: RoutedModel,
        gates: Sequence[torch.Tensor | None],
        half_life: float,
        trace: TraceRecorder | None = None,
    ) -> None:
        self.model, self.gates, self.trace = model, gates, trace
        self.stats = RoutingStats.zeros(*model.shape)
        self.decay = 0.5 ** (1 / half_life)
        self._position = {layer: position for position, layer in enumerate(model.layers)}
        self._history = np.zeros((len(model.layers), 0, model.shape[1]), dtype=bool)  # of the last LAGS decode steps
        self._phase = Phase.PREFILL
        self._open = False
        self._steps = 0  # ended ones in the block
        self._clear()

    # -- what the runtime calls ----------------------------------------------------------------------------------

    def begin_step(self, phase: Phase) -> None:
        """Open a pass; what a pass that broke off left behind is dropped."""
        if phase is not self._phase or self._steps >= BLOCK:
            self._flush()
        self._phase, self._open = phase, True
        for kept in (*self._ids, *self._weights):
            del kept[self._steps :]
        for sampled in self._hidden:
            sampled.pop(self._steps, None)

    def record(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Copy the routing of one layer; its input too in prefill and in every eighth decode step."""
        if not self._open:
            return
        position = self._position[layer]
        self._ids[position].append(ids.clone())
        self._weights[position].append(weights.clone())
        if self._phase is Phase.PREFILL or self._steps % SAMPLE == 0:
            self._hidden[position][self._steps] = hidden.clone()

    def end_step(self) -> None:
        """The pass counts now. A prefill chunk is summed up at once, so that no large copies pile up."""
        self._open = False
        self._steps += 1
        if any(len(ids) != self._steps for ids in self._ids):
            raise IntegrityError("A pass did not run every layer with routed experts exactly once")
        if self._phase is Phase.PREFILL:
            self._flush()

    def end_prompt(self) -> None:
        """Mark the end of a prompt in the trace."""
        self._mark(END_PROMPT)

    def drop_prompt(self) -> None:
        """Mark in the trace that a prompt was given up."""
        self._mark(DROP_PROMPT)

    def finish(self) -> RoutingStats:
        """The sums of all steps that have ended."""
        self._flush()
        return self.stats

    # -- sums ----------------------------------------------------------------------------------------------------

    def _mark(self, after: int) -> None:
        self._flush()
        if self.trace is not None:
            self.trace.mark(after)

    def _clear(self) -> None:
        layers = range(len(self.model.layers))
        self._ids: list[list[torch.Tensor]] = [[] for _ in layers]
        self._weights: list[list[torch.Tensor]] = [[] for _ in layers]
        self._hidden: list[dict[int, torch.Tensor]] = [{} for _ in layers]
        self._steps = 0

    def _flush(self) -> None:
        """Sum up the block. Its copies are read in one go."""
        if self._steps == 0:
            return
        rows = [len(ids) for ids in self._ids[0][: self._steps]]
        ids: Ids = self._joined(self._ids).int().cpu().numpy()
        weights: Floats = self._joined(self._weights).float().cpu().numpy()
        row = PHASES.index(self._phase)
        width = self.model.shape[1]
        self.stats.tokens[row] += sum(rows)
        self.stats.counts[row] += count_ids(ids, width).astype(np.int64)
        self.stats.mass[row] += count_ids(ids, width, weights)
        self._recall(row, ids, rows)
        if self._phase is Phase.DECODE:
            self._add_recent(ids, rows)
            self._add_reuse(ids, rows)
        else:
            self._history = self._history[:, :0]  # another prompt: what was decoded before is no past of it
        if self.trace is not None:
            self.trace.add(self._phase, ids, weights, rows)
        self._clear()

    def _joined(self, parts: Sequence[list[torch.Tensor]]) -> torch.Tensor:
        """[layers, rows of all steps, k]."""
        return torch.stack([torch.cat(layer[: self._steps]) for layer in parts])

    def _add_recent(self, ids: Ids, rows: Sequence[int]) -> None:
        age = np.repeat(np.arange(len(rows) - 1, -1, -1.0), rows)[:, None]
        self.stats.recent *= self.decay ** len(rows)
        self.stats.recent += count_ids(ids, self.model.shape[1], self.decay**age)

    def _add_reuse(self, ids: Ids, rows: Sequence[int]) -> None:
        layers, width = self.model.shape
        step_of = np.repeat(np.arange(len(rows)), rows)
        used = np.zeros((layers, len(rows), width), dtype=bool)
        used[np.arange(layers)[:, None, None], step_of[:, None], ids] = True
        past = self._history.shape[1]
        used = np.concatenate([self._history, used], axis=1)
        for lag in range(1, LAGS + 1):
            known = step_of + past - lag >= 0
            before = (step_of + past - lag)[known]
            again = used[np.arange(layers)[:, None, None], before[:, None], ids[:, known]]
            self.stats.reuse_hits[:, lag - 1] += again.sum(axis=(1, 2))
            self.stats.reuse_pairs[:, lag - 1] += again[0].size
        self._history = used[:, -LAGS:]

    def _recall(self, row: int, ids: Ids, rows: Sequence[int]) -> None:
        """Try each layer's gate on the input of the layer before, on the steps whose inputs were kept."""
        kept = sorted(self._hidden[0])
        starts = np.concatenate([[0], np.cumsum(rows)])
        chosen = np.concatenate([np.arange(starts[step], starts[step + 1]) for step in kept] or [np.empty(0, int)])
        for position, gate in enumerate(self.gates[1:], 1):
            if gate is None or not len(chosen):
                continue
            before = torch.cat([self._hidden[position - 1][step] for step in kept])
            guess = (before @ gate.to(before.dtype).T).topk(self.model.top_k).indices.cpu().numpy()
            routed = ids[position, chosen]
            self.stats.recall_hits[row, position] += (guess[:, :, None] == routed[:, None, :]).sum()
            self.stats.recall_pairs[row, position] += routed.size
