"""The contracts of the expert room: what an expert is, who computes it, and what may change when.

Host truth: the store's copy of every expert is complete and valid for the life of the model. Slots hold
copies. An executor reads slots and store; it never moves an expert. Residency moves experts, only between
steps. ``Phase`` is said by the engine, never guessed from the number of rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch


class Phase(Enum):
    """What a forward pass is for."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True)
class ExpertPart:
    """One tensor inside an expert's blob. ``format`` names a block format of ``files.blocks``.

    The bytes are those blocks as they lie in the file, or, in a planar layout, packed from them.
    """

    name: str  # "gate", "up", "down", and biases "gate_bias"...
    shape: tuple[int, ...]  # torch order: gate/up (width, hidden), down (hidden, width)
    format: str
    offset: int  # from the start of the blob, a multiple of 64
    nbytes: int


@dataclass(frozen=True)
class ExpertLayout:
    """Layout of every expert of one layer. ``blob_bytes`` is padded to 64; layers with equal size share an arena.

    ``planar`` says that parts are packed as planes (``native.layout``), which is what the C core computes with.
    """

    layer: int
    num_experts: int
    hidden: int
    width: int
    activation: str  # "silu", "gelu_tanh"
    parts: tuple[ExpertPart, ...]
    blob_bytes: int
    planar: bool = False


@dataclass
class ExpertWork:
    """One layer's routed rows. Owned by the caller; the executor writes only ``out``.

    hidden  float [rows, hidden]; ids int64 [rows, k]; weights float [rows, k] (final, normalised);
    out     float [rows, hidden], preallocated, overwritten whole; valid until the same layer runs again.
    """

    layer: int
    phase: Phase
    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    out: torch.Tensor


class ExpertExecutor(ABC):
    """Computes ``out = sum_k weights[:, k] * expert_ids[:, k](hidden)``.

    ``submit`` may start work and must not wait for the device; ``wait`` returns when ``work.out`` is usable by
    the next kernel on the caller's stream. At most one submission is in flight per executor. The sum runs over
    k in routing order, so placement alone never changes which terms are added in which order.

    The reference executor is for the host and exempt from not waiting: it reads ids and slots there, and so waits for
    the device in ``submit`` when the rows lie on one. It proves results; a serving path on a GPU needs another.
    """

    @abstractmethod
    def submit(self, work: ExpertWork) -> None:
        """Start computing ``work``."""

    @abstractmethod
    def wait(self) -> None:
        """Finish the submitted work."""

    @abstractmethod
    def reset(self) -> None:
        """Forget a submission that broke off, and protect its experts no longer. Does nothing when none has."""


class RoutingObserver(Protocol):
    """Hears of every pass of an ``ExpertRuntime``: profiles and traces. It changes nothing, and keeps no tensor as is:
    what it is shown may be overwritten after the pass. A pass that breaks off is followed by another ``begin_step``.
    """

    def begin_step(self, phase: Phase) -> None:
        """A forward pass begins."""

    def record(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """A layer was routed: hidden [rows, hidden], what the router saw; ids and weights [rows, k]."""

    def end_step(self) -> None:
        """The pass has succeeded."""

    def end_prompt(self) -> None:
        """The last chunk of a prompt has ended."""

    def drop_prompt(self) -> None:
        """A prompt was given up."""
