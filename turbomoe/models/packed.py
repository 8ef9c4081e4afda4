"""Linear layers and embeddings whose weights stay packed, computed by the C core from int8 activations.

The weights are the file's own blocks, rearranged without loss (``native.packed``); no float copy of them exists.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from threading import Lock

import torch
from torch import nn

from turbomoe.native import reference
from turbomoe.native.kernels import MANY
from turbomoe.native.layout import packed_layout
from turbomoe.native.library import LINEAR_MATRICES, TYPES, CLinearCall, NativeError, check_status
from turbomoe.native.packed import PackedMatrix
from turbomoe.native.pool import WorkerPool
from turbomoe.native.reference import round_activations
from turbomoe.native.repack import plane_bytes, unpack

ROWS = 512  # rows of one native call: longer inputs are cut, so that the core's room stays small
_TYPES = {getattr(torch, name): number for name, number in TYPES.items()}


class LinearRoom:
    """The core's memory for linear calls, shared by all layers of a pool, one call at a time. Grows with columns."""

    def __init__(self, pool: WorkerPool) -> None:
        self.pool, self.lock, self.work, self._cols = pool, Lock(), 0, 0
        self._free: weakref.finalize[..., LinearRoom] | None = None

    def reserve(self, cols: int) -> None:
        """Make room for inputs of ``cols`` values. The caller holds the lock or is the only one."""
        if cols <= self._cols:
            return
        work = self.pool.core.linear_work_new(self.pool.handle, cols, ROWS)
        if not work:
            raise NativeError("No room for linear layers", why=f"{ROWS} rows of {cols} values")
        if self._free is not None:
            self._free()
        self.work, self._cols = work, cols
        self._free = weakref.finalize(self, _free, self.pool, work)


def _free(pool: WorkerPool, work: int) -> None:
    """Free a work, holding the pool that it belongs to until then."""
    pool.core.linear_work_free(work)


_rooms: weakref.WeakValueDictionary[int, LinearRoom] = weakref.WeakValueDictionary()  # by the pool's handle


def linear_room(pool: WorkerPool) -> LinearRoom:
    room = _rooms.get(pool.handle)
    if room is None or room.pool is not pool:
        room = _rooms[pool.handle] = LinearRoom(pool)
    return room


class PackedCall:
    """Up to 8 packed matrices that share their input, ready to run: only addresses change from call to call."""

    def __init__(self, matrices: Sequence[PackedMatrix], pool: WorkerPool | None) -> None:
        self.matrices = tuple(matrices)
        self._rows = [matrix.layout.rows for matrix in matrices]
        self._total = sum(self._rows)
        self._cols = matrices[0].layout.cols
        self._room = None if pool is None else linear_room(pool)
        if self._room is not None:
            self._prepare(self._room)

    def _prepare(self, room: LinearRoom) -> None:
        with room.lock:
            room.reserve(self._cols)
        self._call = CLinearCall(count=len(self.matrices))
        for i, matrix in enumerate(self.matrices):
            self._call.matrices[i] = matrix.c_linear()
        self._places = [self._call.matrices[i] for i in range(len(self.matrices))]
        self._run, self._address = room.pool.core.linear_run, ctypes.addressof(self._call)

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x float [..., cols] on the CPU -> one tensor [..., rows] of its dtype per matrix."""
        shape, flat = x.shape[:-1], x.reshape(-1, self._cols).contiguous()
        if self._room is None:
            return [reference.linear(m, flat).to(x.dtype).view(*shape, m.layout.rows) for m in self.matrices]
        count = len(flat)
        out = flat.new_empty(count * self._total)
        pieces = out.split([count * rows for rows in self._rows]) if len(self._rows) > 1 else (out,)
        for start in range(0, count, ROWS):
            self._run_rows(self._room, flat, out, start, min(ROWS, count - start))
        return [piece.view(*shape, rows) for piece, rows in zip(pieces, self._rows, strict=True)]

    def _run_rows(self, room: LinearRoom, x: torch.Tensor, out: torch.Tensor, start: int, count: int) -> None:
        call, size, at = self._call, x.element_size(), out.data_ptr()
        with room.lock:
            call.work, call.tokens, call.many = room.work, count, count >= MANY
            call.x = x.data_ptr() + start * self._cols * size
            call.x_type = call.out_type = _TYPES[x.dtype]
            for place, rows in zip(self._places, self._rows, strict=True):
                place.out = at + start * rows * size
                at += len(x) * rows * size
            self._run(self._address)
            check_status(call.status)


class PackedLinear(nn.Module):
    """``y = x @ W.T + bias`` with a packed W: float [..., cols] -> [..., rows] of the input's dtype.

    ``columns`` (int64 [cols]) reorders the input first, for files whose columns lie in another order. No parameters:
    a packed weight has no gradient and no dtype to cast to.
    """

    def __init__(self, matrix: PackedMatrix, pool: WorkerPool | None, columns: torch.Tensor | None = None) -> None:
        super().__init__()
        self.matrix, self.pool, self.columns = matrix, pool, columns
        self.in_features, self.out_features = matrix.layout.cols, matrix.layout.rows
        self._alone = PackedCall([matrix], pool)
        self._calls: dict[tuple[int, ...], PackedCall] = {}  # by ids of the matrices, which the calls keep alive

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.columns is not None:
            x = x.index_select(-1, self.columns)
        return self._alone(x)[0]

    def call_with(self, others: Sequence[PackedLinear]) -> PackedCall:
        """The call that computes this layer and ``others`` at once, made at first use."""
        key = tuple(id(other.matrix) for other in others)
        if key not in self._calls:
            self._calls[key] = PackedCall([self.matrix, *(other.matrix for other in others)], self.pool)
        return self._calls[key]

    def extra_repr(self) -> str:
        layout = self.matrix.layout
        return f"{layout.cols}, {layout.rows}, {layout.format.name}"


class PackedHead(PackedLinear):
    """An output head: what rounding left of its input is rounded and multiplied too, as if activations had 15 bits.

    Logits show every rounding, and the head reads its weights once a token, whatever the number of inputs.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.columns is not None or self.pool is None or self.matrix.layout.format.is_float:
            return super().forward(x)
        both = self._alone(torch.stack((x, x - round_activations(x).to(x.dtype))))[0]
        y = both[0] + both[1]
        return y if self.matrix.bias is None else y - self.matrix.bias


def run_together(linears: Sequence[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    """Outputs of several projections of one input, packed ones in one native call, all others one by one."""
    packed = [layer for layer in linears if isinstance(layer, PackedLinear) and layer.columns is None]
    if not 1 < len(packed) <= LINEAR_MATRICES:
        return [layer(x) for layer in linears]
    results = packed[0].call_with(packed[1:])(x)
    if len(packed) == len(linears):
        return results
    found = dict(zip(map(id, packed), results, strict=True))
    return [found[id(layer)] if id(layer) in found else layer(x) for layer in linears]


class PackedEmbedding(nn.Module):
    """An embedding table that stays packed: ids int64 [...] -> float32 [..., cols], rows unpacked as they are needed.

    ``scale``, a tensor of one element, multiplies the rows (Gemma).
    """

    def __init__(self, matrix: PackedMatrix, scale: torch.Tensor | None = None) -> None:
        super().__init__()
        self.matrix = matrix
        self.num_embeddings, self.embedding_dim = matrix.layout.rows, matrix.layout.cols
        self.embed_scale: torch.Tensor | None
        self.register_buffer("embed_scale", scale, persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = unpack_rows(self.matrix, ids.reshape(-1))
        if self.embed_scale is not None:
            rows = rows * self.embed_scale
        return rows.view(*ids.shape, -1)


def unpack_rows(matrix: PackedMatrix, ids: torch.Tensor) -> torch.Tensor:
    """Rows ``ids`` int64 [n] of a packed matrix: float32 [n, cols], bit-equal to the file's values."""
    layout = matrix.layout
    small = packed_layout(layout.format.name, max(len(ids), 1), layout.cols)
    blob = torch.empty(small.nbytes, dtype=torch.uint8)
    for name in small.planes:
        rows = plane_bytes(matrix.blob, layout, name).index_select(0, ids)
        plane_bytes(blob, small, name)[: len(ids)] = rows
    return unpack(blob, layout.format.name, small.rows, small.cols)[: len(ids)]
