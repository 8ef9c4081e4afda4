"""The routing of a run, step by step: what the simulator replays.

A step is one forward pass. Rows are tokens in prefill and sequences in decode.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt

from turbomoe.experts.base import Phase
from turbomoe.files.array_file import RecordError, load_arrays, save_arrays
from turbomoe.insight.profile_model import RoutedModel, read_model

KIND, VERSION = "turbomoe-expert-trace", 1
LARGEST_FILE = 1 << 34
PHASES = tuple(Phase)
NOTHING, END_PROMPT, DROP_PROMPT = 0, 1, 2  # what came after a step
UNPACKED_ROWS = 1024
NONE = 0xFFFF  # an id where nothing was routed
FORMS: dict[str, tuple[int, type]] = {  # dimensions and type of the arrays
    "ids": (3, np.uint16),
    "weights": (3, np.float16),
    "rows": (1, np.int32),
    "phases": (1, np.uint8),
    "after": (1, np.uint8),
}


@dataclass(frozen=True)
class Step:
    """One pass: ids int32 [layers, rows, k], -1 for none; ``after`` is NOTHING, END_PROMPT or DROP_PROMPT."""

    phase: Phase
    ids: npt.NDArray[np.int32]
    after: int


@dataclass(frozen=True)
class Trace:
    """``ids`` uint16 and ``weights`` float16 [rows of all steps, layers, k]; [steps] each: ``rows`` int32,
    ``phases`` uint8 (0 prefill, 1 decode) and ``after`` uint8.
    """

    model: RoutedModel
    domain: str
    ids: npt.NDArray[np.uint16]
    weights: npt.NDArray[np.float16]
    rows: npt.NDArray[np.int32]
    phases: npt.NDArray[np.uint8]
    after: npt.NDArray[np.uint8]

    def __post_init__(self) -> None:
        for name, (dims, dtype) in FORMS.items():
            array = getattr(self, name)
            if array.ndim != dims or array.dtype != dtype:
                raise RecordError(f"its array {name} has another shape or type than a trace's")
        if not len(self.rows) == len(self.phases) == len(self.after):
            raise RecordError("its lists of steps do not agree")
        if (self.rows < 0).any() or (self.phases > 1).any() or (self.after > DROP_PROMPT).any():
            raise RecordError("one of its steps makes no sense")
        form = (int(self.rows.sum(dtype=np.int64)), len(self.model.layers), self.model.top_k)
        if self.ids.shape != form or self.weights.shape != form:
            raise RecordError("its routing has another shape than its steps and model")
        if ((self.ids != NONE) & (self.ids >= np.array(self.model.experts)[:, None])).any():
            raise RecordError("it routes to experts that its model does not have")

    def steps(self, copies: int = 1) -> Iterator[Step]:
        """The passes in order; with ``copies`` the layers of each come so many times, one set after another."""
        ends = np.cumsum(self.rows, dtype=np.int64).tolist()
        kinds = zip(self.rows.tolist(), ends, self.phases.tolist(), self.after.tolist(), strict=True)
        opened = closed = 0
        for rows, end, phase, after in kinds:
            start = end - rows
            if end > closed:  # unpacked in large pieces: a step alone is small, and calls are what costs
                opened, closed = start, max(end, min(start + UNPACKED_ROWS, len(self.ids)))
                ids = self._unpacked(opened, closed, copies)
            yield Step(PHASES[phase], ids[:, start - opened : end - opened], after)

    def _unpacked(self, start: int, end: int, copies: int) -> npt.NDArray[np.int32]:
        """Ids [copies * layers, rows, k] of some rows, -1 for none."""
        ids = np.tile(self.ids[start:end].transpose(1, 0, 2), (copies, 1, 1)).astype(np.int32)
        ids[ids == NONE] = -1
        return ids

    @property
    def decode_rows(self) -> int:
        """Rows of all decode steps."""
        return int(self.rows[self.phases == 1].sum(dtype=np.int64))

    def save(self, path: str | PathLike[str]) -> None:
        """Write to ``path``, whole or not at all. Raises ``files.atomic.WriteError``."""
        header = {"model": self.model.to_json(), "domain": self.domain}
        save_arrays(path, KIND, VERSION, header, {name: getattr(self, name) for name in FORMS})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Trace:
        """Read a trace. Raises ``RecordError`` for a missing, foreign, damaged or newer file."""
        header, arrays = load_arrays(path, KIND, VERSION, LARGEST_FILE)
        try:
            if set(arrays) != set(FORMS) or not isinstance(header.get("domain"), str):
                raise RecordError("it has other arrays than a trace")
            return cls(read_model(header.get("model")), header["domain"], **arrays)
        except RecordError as error:
            raise RecordError(f"Cannot use {path} as expert trace: {error.what}") from error


class TraceRecorder:
    """Collects steps as they end. Memory grows with the run: 4 bytes an expert used, layer and token."""

    def __init__(self, model: RoutedModel) -> None:
        self.model = model
        self._ids: list[npt.NDArray[np.uint16]] = []
        self._weights: list[npt.NDArray[np.float16]] = []
        self._steps: list[list[int]] = []

    def add(self, phase: Phase, ids: npt.NDArray[Any], weights: npt.NDArray[Any], rows: list[int]) -> None:
        """Steps of ``rows`` rows each: ids and weights [layers, all rows, k], -1 for none."""
        self._ids.append(np.where(ids < 0, NONE, ids).astype(np.uint16).transpose(1, 0, 2))
        self._weights.append(weights.astype(np.float16).transpose(1, 0, 2))
        self._steps += [[count, PHASES.index(phase), NOTHING] for count in rows]

    def mark(self, after: int) -> None:
        """What came after the last step: END_PROMPT or DROP_PROMPT."""
        if self._steps:
            self._steps[-1][2] = after

    def finish(self, domain: str) -> Trace:
        """What was recorded so far."""
        shape = (0, len(self.model.layers), self.model.top_k)
        ids = np.concatenate([np.empty(shape, np.uint16), *self._ids])
        weights = np.concatenate([np.empty(shape, np.float16), *self._weights])
        steps = np.array(self._steps, dtype=np.int64).reshape(-1, 3)
        rows, phases, after = steps[:, 0].astype(np.int32), steps[:, 1].astype(np.uint8), steps[:, 2].astype(np.uint8)
        return Trace(self.model, domain, ids, weights, rows, phases, after)
