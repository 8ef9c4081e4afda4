"""Packed weights in memory: matrices, and experts as one blob each."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from turbomoe.errors import ModelError
from turbomoe.native.layout import ALIGN, PackedLayout, packed_layout
from turbomoe.native.library import GATES, CExperts, CLinear
from turbomoe.native.repack import check_bytes, not_finite, pack

if TYPE_CHECKING:
    from turbomoe.native.pool import WorkerPool

MATRICES = ("gate", "up", "down")


def aligned_bytes(nbytes: int) -> torch.Tensor:
    """A zeroed uint8 tensor [nbytes] that starts at a multiple of 64."""
    memory = torch.zeros(nbytes + ALIGN, dtype=torch.uint8)
    start = -memory.data_ptr() % ALIGN
    return memory[start : start + nbytes]


def pack_into(out: torch.Tensor, raw: torch.Tensor, format: str, rows: int, cols: int, pool: WorkerPool | None) -> None:
    """Pack GGUF blocks ``raw`` into ``out`` [nbytes, 64-byte aligned], with the C core where there is one.

    ``ModelError`` for a wrong size or a scale that is not finite.
    """
    if pool is None:
        pack(raw, format, rows, cols, out)
        return
    layout = packed_layout(format, rows, cols)
    check_bytes(layout, raw)
    raw = raw.contiguous()
    status = pool.core.pack(pool.handle, layout.format.index, rows, cols, raw.data_ptr(), out.data_ptr())
    if status > 0:
        raise not_finite(format, status - 1)


@dataclass(frozen=True)
class PackedMatrix:
    """A packed matrix [rows, cols]: its layout, its bytes (64-byte aligned) and perhaps a bias, float32 [rows]."""

    layout: PackedLayout
    blob: torch.Tensor
    bias: torch.Tensor | None = None

    @classmethod
    def from_raw(
        cls,
        raw: torch.Tensor,
        format: str,
        rows: int,
        cols: int,
        pool: WorkerPool | None,
        bias: torch.Tensor | None = None,
    ) -> PackedMatrix:
        """Pack GGUF blocks (uint8, any shape, row-major)."""
        layout = packed_layout(format, rows, cols)
        blob = aligned_bytes(layout.nbytes)
        pack_into(blob, raw, format, rows, cols, pool)
        return cls(layout, blob, None if bias is None else bias.float().contiguous())

    def c_linear(self, out: int | None = None) -> CLinear:
        """The C core's view, results to address ``out`` (None: set later). This object must outlive it."""
        layout, bias = self.layout, None if self.bias is None else self.bias.data_ptr()
        return CLinear(layout.format.index, layout.rows, layout.cols, self.blob.data_ptr(), bias, out, layout.rows)


@dataclass(frozen=True)
class ExpertShape:
    """How every expert of a layer lies in its blob: matrices, then biases, each at a multiple of 64.

    ``activation`` is a key of ``library.GATES``; ``alpha`` and ``limit`` are those of the clipped SwiGLU.
    """

    hidden: int
    width: int
    activation: str
    layouts: Mapping[str, PackedLayout]
    offsets: Mapping[str, int]  # of matrices and of biases ("gate_bias"...)
    nbytes: int
    alpha: float = 1.702
    limit: float = 7.0

    @property
    def raw_bytes(self) -> int:
        """Bytes of the matrices in GGUF blocks."""
        return sum(layout.raw_bytes for layout in self.layouts.values())


def expert_shape(
    hidden: int,
    width: int,
    formats: Mapping[str, str],
    activation: str = "silu",
    biases: Sequence[str] = (),
    alpha: float = 1.702,
    limit: float = 7.0,
) -> ExpertShape:
    """Lay out an expert whose ``gate``, ``up`` and ``down`` have these formats. ``ModelError`` if that cannot be."""
    if activation not in GATES:
        raise ModelError(f"No expert kernel has the activation {activation}", why=f"it knows {', '.join(GATES)}")
    sizes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    layouts = {name: packed_layout(formats[name], *sizes[name]) for name in MATRICES}
    if layouts["gate"].format.is_float != layouts["up"].format.is_float:
        raise ModelError("Gate and up cannot be packed together", why="one of them is quantised and one is not")
    offsets, at = {}, 0
    for name in MATRICES:
        offsets[name] = at
        at += layouts[name].nbytes
    for name in biases:
        offsets[name] = at
        at += -(-4 * sizes[name.removesuffix("_bias")][0] // ALIGN) * ALIGN
    return ExpertShape(hidden, width, activation, layouts, offsets, at, alpha, limit)


def pack_expert(
    shape: ExpertShape, raw: Mapping[str, torch.Tensor], out: torch.Tensor, pool: WorkerPool | None
) -> None:
    """Pack one expert into its blob ``out`` [nbytes]: ``raw`` holds GGUF blocks by matrix, and biases as floats."""
    for name, layout in shape.layouts.items():
        at = shape.offsets[name]
        pack_into(out[at : at + layout.nbytes], raw[name], layout.format.name, layout.rows, layout.cols, pool)
    for name in shape.offsets.keys() - shape.layouts.keys():
        values = raw[name].float().contiguous().view(torch.uint8)
        out[shape.offsets[name] : shape.offsets[name] + len(values)] = values


class PackedExperts:
    """The experts of one layer, complete: a blob per expert, None for one that is not here.

    Blobs stay where they are for the life of this object; it keeps them alive.
    """

    def __init__(self, shape: ExpertShape, blobs: Sequence[torch.Tensor | None]) -> None:
        self.shape, self.blobs = shape, list(blobs)
        for index, blob in enumerate(self.blobs):
            if blob is not None and (
                blob.numel() < shape.nbytes or blob.data_ptr() % ALIGN or not blob.is_contiguous()
            ):
                raise ModelError(f"The blob of expert {index} is too short or not 64-byte aligned")
        self._pointers = (ctypes.c_void_p * len(self.blobs))(
            *[b.data_ptr() if b is not None else None for b in self.blobs]
        )
        self.c = self._c_struct()

    def _c_struct(self) -> CExperts:
        s = self.shape
        numbers = {f"{n}_format": s.layouts[n].format.index for n in MATRICES}
        places = {f"{n}_at": s.offsets[n] for n in MATRICES} | {
            f"{n}_bias_at": s.offsets.get(f"{n}_bias", -1) for n in MATRICES
        }
        return CExperts(
            hidden=s.hidden, width=s.width, experts=len(self.blobs), gate=GATES[s.activation], alpha=s.alpha,
            limit=s.limit, blobs=self._pointers, **numbers, **places,
        )  # fmt: skip

    def matrices(self, index: int) -> dict[str, PackedMatrix]:
        """Gate, up and down of one expert as views. ``ModelError`` if the expert is not here."""
        blob = self.blobs[index]
        if blob is None:
            raise ModelError(f"Expert {index} has no weights here")
        return {
            name: PackedMatrix(layout, self._view(blob, name, layout.nbytes), self._bias(blob, name))
            for name, layout in self.shape.layouts.items()
        }

    def _view(self, blob: torch.Tensor, name: str, nbytes: int) -> torch.Tensor:
        at = self.shape.offsets[name]
        return blob[at : at + nbytes]

    def _bias(self, blob: torch.Tensor, name: str) -> torch.Tensor | None:
        if f"{name}_bias" not in self.shape.offsets:
            return None
        return self._view(blob, f"{name}_bias", 4 * self.shape.layouts[name].rows).view(torch.float32)
