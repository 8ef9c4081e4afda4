"""Gathers routing while a model runs, at the price of one small copy a layer, and sums it up block by block."""

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
SAMPLE = 8  # one decode step in so many is asked for gate weights and for the layers' inputs: copies are what costs

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
        self._history = np.zeros(
            (len(model.layers), 0, model.shape[1]), np.float32
        )  # 1 where one of the last 32 used it
        self._phase = Phase.PREFILL
        self._open = self._sampled = False
        self._steps = self._seen = 0  # steps that ended in this block, layers that the open one has run
        self._clear()

    # -- what the runtime calls ----------------------------------------------------------------------------------

    def begin_step(self, phase: Phase) -> None:
        """Open a pass; what a pass that broke off left behind is dropped."""
        if self._seen:
            self._forget_broken()
        if phase is not self._phase or self._steps >= BLOCK:
            self._flush()
        self._phase, self._open = phase, True
        self._sampled = phase is Phase.PREFILL or self._steps % SAMPLE == 0

    def record(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Copy the routing of one layer; weights and input too in prefill and in every eighth decode step."""
        if not self._open:
            return
        position = self._position[layer]
        self._seen += 1
        self._ids[position].append(ids.clone())
        if self._sampled or self.trace is not None:
            self._weights[position][self._steps] = weights.clone()
        if self._sampled:
            self._hidden[position][self._steps] = hidden.clone()

    def end_step(self) -> None:
        """The pass counts now. A prefill chunk is summed up at once, so that no large copies pile up."""
        self._open = False
        if self._seen != len(self._ids):
            raise IntegrityError("A pass did not run every layer with routed experts exactly once")
        self._seen = 0
        self._steps += 1
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
        self._weights: list[dict[int, torch.Tensor]] = [{} for _ in layers]  # by step of the block, as the inputs
        self._hidden: list[dict[int, torch.Tensor]] = [{} for _ in layers]
        self._steps = self._seen = 0

    def _forget_broken(self) -> None:
        """Drop what layers told of a pass that never ended."""
        self._seen = 0
        for position, ids in enumerate(self._ids):
            del ids[self._steps :]
            self._weights[position].pop(self._steps, None)
            self._hidden[position].pop(self._steps, None)

    def _flush(self) -> None:
        """Sum up the block. Its copies are read in one go."""
        if self._steps == 0:
            return
        rows = [len(ids) for ids in self._ids[0]]
        ids: Ids = torch.stack([torch.cat(layer) for layer in self._ids]).int().cpu().numpy()
        row = PHASES.index(self._phase)
        self.stats.tokens[row] += sum(rows)
        self.stats.counts[row] += count_ids(ids, self.model.shape[1]).astype(np.int64)
        sampled = _rows_of(sorted(self._hidden[0]), rows)
        weights = self._add_mass(row, ids, sampled)
        self._recall(row, ids[:, sampled])
        if self._phase is Phase.DECODE:
            self._add_recent(ids, rows)
            self._add_reuse(ids, rows)
        else:
            self._history = self._history[:, :0]  # another prompt: what was decoded before is no past of it
        if self.trace is not None:
            self.trace.add(self._phase, ids, weights, rows)
        self._clear()

    def _add_mass(self, row: int, ids: Ids, sampled: npt.NDArray[np.int64]) -> Floats:
        """Sum up the gate weights of the ``sampled`` rows; all weights that were kept, [layers, kept rows, k]."""
        kept = torch.stack([torch.cat(list(layer.values())) for layer in self._weights])
        weights: Floats = kept.float().cpu().numpy()
        mass = weights[:, sampled] if weights.shape == ids.shape else weights
        self.stats.mass[row] += count_ids(ids[:, sampled], self.model.shape[1], mass)
        return weights

    def _add_recent(self, ids: Ids, rows: Sequence[int]) -> None:
        age = np.repeat(np.arange(len(rows) - 1, -1, -1.0), rows)[:, None]
        self.stats.recent *= self.decay ** len(rows)
        self.stats.recent += count_ids(ids, self.model.shape[1], self.decay**age)

    def _add_reuse(self, ids: Ids, rows: Sequence[int]) -> None:
        """Count overlaps of rows with the steps before them: products of indicators, of which we read diagonals."""
        layers, width = self.model.shape
        step_of = np.repeat(np.arange(len(rows)), rows)
        where = np.arange(layers)[:, None, None]
        row_uses = np.zeros((layers, ids.shape[1], width), dtype=np.float32)
        row_uses[where, np.arange(ids.shape[1])[:, None], ids] = 1
        used = np.zeros((layers, len(rows), width), dtype=np.float32)
        used[where, step_of[:, None], ids] = 1
        past = self._history.shape[1]
        used = np.concatenate([self._history, used], axis=1)
        overlap = row_uses @ used.transpose(0, 2, 1)
        before = (step_of + past)[:, None] - np.arange(1, LAGS + 1)
        found = np.take_along_axis(overlap, np.maximum(before, 0)[None], axis=2)
        self.stats.reuse_hits += np.where(before >= 0, found, 0).sum(axis=1).astype(np.int64)
        self.stats.reuse_pairs += (before >= 0).sum(axis=0) * ids.shape[2]
        self._history = used[:, -LAGS:]

    def _recall(self, row: int, routed: Ids) -> None:
        """Try each layer's gate on the input of the layer before; routed [layers, sampled rows, k]."""
        for position, gate in enumerate(self.gates[1:], 1):
            if gate is None or not routed.size:
                continue
            before = torch.cat(list(self._hidden[position - 1].values()))
            guess = (before @ gate.to(before.dtype).T).topk(self.model.top_k).indices.cpu().numpy()
            hits = (guess[:, :, None] == routed[position][:, None, :]).sum()
            self.stats.recall_hits[row, position] += hits
            self.stats.recall_pairs[row, position] += routed[position].size


def _rows_of(steps: Sequence[int], rows: Sequence[int]) -> npt.NDArray[np.int64]:
    """Indices of the rows of ``steps`` in a block whose steps have ``rows`` rows."""
    starts = np.concatenate([[0], np.cumsum(rows)])
    parts = [np.arange(starts[step], starts[step + 1]) for step in steps]
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])
