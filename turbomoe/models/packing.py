"""Which weights of a shell stay packed, and how the file's blocks become packed matrices.

llama.cpp's converter reorders rows or columns of some tensors. Rows are whole blocks, so their order is undone on the
blocks; columns are reordered with their blocks where they move block by block, and else in the layer's input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from turbomoe.files.base import TensorInfo
from turbomoe.models.packed import PackedEmbedding, PackedHead, PackedLinear
from turbomoe.models.placement import Dense, Transform, same
from turbomoe.models.plan import LoadPlan
from turbomoe.native.layout import FORMATS, PackedLayout, packed_layout
from turbomoe.native.packed import PackedMatrix
from turbomoe.native.pool import WorkerPool


@dataclass(frozen=True)
class Packing:
    """How one tensor of the file becomes a packed matrix.

    ``rows`` and ``blocks`` (int64) are orders of the file's rows and of the blocks in each row; ``columns`` is the
    order of the layer's inputs that undoes the rest. None: as they are.
    """

    layout: PackedLayout
    rows: torch.Tensor | None = None
    blocks: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    def pack(self, raw: torch.Tensor, pool: WorkerPool | None, bias: torch.Tensor | None = None) -> PackedMatrix:
        """The matrix, from the tensor's bytes uint8 [nbytes] as they lie in the file."""
        f = self.layout.format
        if self.rows is not None:
            raw = raw.view(self.layout.rows, -1)[self.rows].flatten()
        if self.blocks is not None:
            raw = raw.view(self.layout.rows, -1, f.block_bytes)[:, self.blocks].flatten()
        return PackedMatrix.from_raw(raw, f.name, self.layout.rows, self.layout.cols, pool, bias)


def plan_packing(plan: LoadPlan, shell: nn.Module) -> dict[str, Packing]:
    """The packing of every weight that can stay packed, by the weight's name in the model.

    Weights of linear layers and embeddings in any packed format but F32, which is computed as it is.
    """
    found = {}
    for info, to in plan.dense:
        path, _, leaf = to.name.rpartition(".")
        module = shell.get_submodule(path)
        fits = type(module) is nn.Linear or isinstance(module, nn.Embedding)
        if fits and leaf == "weight" and (packing := packing_of(info, to, embedding=isinstance(module, nn.Embedding))):
            found[to.name] = packing
    return found


def packing_of(info: TensorInfo, to: Dense, *, embedding: bool) -> Packing | None:
    """How a tensor of the file stays packed as ``to``; None if it is none, or is changed by more than reordering."""
    shape = tuple(to.transform(torch.empty(info.shape, device="meta")).shape)
    if info.format == "F32" or info.format not in FORMATS or len(info.shape) != 2 or shape != info.shape:
        return None
    layout = packed_layout(info.format, *info.shape)
    if to.transform is same:
        return Packing(layout)
    if embedding:
        return None
    if (rows := _order(to.transform, layout.rows, axis=0)) is not None:
        return Packing(layout, rows=rows)
    columns = _order(to.transform, layout.cols, axis=1)
    return None if columns is None else _by_columns(layout, columns)


def _order(transform: Transform, size: int, axis: int) -> torch.Tensor | None:
    """The order in which ``transform`` takes indices along ``axis``; None if it is more than a reordering of them.

    Found by handing it the indices themselves: a transform of values, or of the other axis, returns something else.
    """
    indices = torch.arange(size, dtype=torch.float32)
    try:
        moved = transform(indices.unsqueeze(1 - axis)).flatten()
    except RuntimeError:  # it cannot take an axis of one apart
        return None
    return moved.to(torch.int64) if torch.equal(moved.sort().values, indices) else None


def _by_columns(layout: PackedLayout, columns: torch.Tensor) -> Packing:
    """Whole blocks move in the file's bytes. Else the inputs move: W[:, order] x = W x[inverse order]."""
    by_block = columns.view(-1, layout.format.block)
    together = by_block[:, :1] + torch.arange(layout.format.block)
    if torch.equal(by_block, together) and not (by_block[:, 0] % layout.format.block).any():
        return Packing(layout, blocks=by_block[:, 0] // layout.format.block)
    return Packing(layout, columns=columns.argsort())


def swap_packed(
    shell: nn.Module,
    matrices: Mapping[str, PackedMatrix],
    packing: Mapping[str, Packing],
    pool: WorkerPool | None,
) -> None:
    """Put packed layers where the weights ``matrices`` (by name in the model) belong.

    Biases must be in place already. A tied head uses the embedding's very bytes.
    """
    tied = shell.config.tie_word_embeddings  # type: ignore[union-attr]
    for name, matrix in matrices.items():
        path = name.removesuffix(".weight")
        module = shell.get_submodule(path)
        if isinstance(module, nn.Embedding):
            shell.set_submodule(path, PackedEmbedding(matrix, scale=getattr(module, "embed_scale", None)))
            if tied:
                shell.set_output_embeddings(PackedHead(matrix, pool))  # type: ignore[operator]
        else:
            kind = PackedHead if module is shell.get_output_embeddings() else PackedLinear  # type: ignore[operator]
            shell.set_submodule(path, kind(_with_bias(matrix, module), pool, packing[name].columns))


def _with_bias(matrix: PackedMatrix, module: nn.Module) -> PackedMatrix:
    bias = module._parameters.get("bias")
    return matrix if bias is None else PackedMatrix(matrix.layout, matrix.blob, bias.detach().float().contiguous())


def packed_weight_bytes(shell: nn.Module, packing: Mapping[str, Packing]) -> int:
    """Bytes that the shell's weights will take: packed ones as packed, all others as they are."""
    plain = sum(p.nbytes for name, p in shell.named_parameters() if name not in packing)
    return plain + sum(p.layout.nbytes for p in packing.values())
