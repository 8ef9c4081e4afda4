"""What models call: packed experts and packed linear layers on the CPU, by the C core or by its reference.

``open_pool`` picks, once and visibly: it returns None (and has said so) where no core is there, and everything here
takes that None and computes in PyTorch instead. Results are written to tensors that the caller owns.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence

import torch

from turbomoe.native import reference
from turbomoe.native.library import (
    LINEAR_MATRICES,
    TYPES,
    CExpertsCall,
    CExpertsRoom,
    CLinearCall,
    NativeError,
    check_status,
    load_core,
)
from turbomoe.native.packed import PackedExperts, PackedMatrix
from turbomoe.native.pool import HOT_US, WorkerPool

# Rows from which models ask for the kernels of prefill (``many``): faster, but a row's last bits depend on how many
# rows there are.
MANY = 32
_TYPES = {getattr(torch, name): number for name, number in TYPES.items()}


def open_pool(threads: int = 0, hot_us: int = HOT_US) -> WorkerPool | None:
    """A worker pool of the C core, or None where there is no core (a notice says so)."""
    core = load_core()
    return None if core is None else WorkerPool(core, threads, hot_us)


def _type_of(x: torch.Tensor, name: str) -> int:
    """The C number of a tensor's type; ``NativeError`` unless it is contiguous on the CPU and float."""
    if not x.is_contiguous() or x.device.type != "cpu" or x.dtype not in _TYPES:
        raise NativeError(
            f"{name} must be a contiguous CPU tensor of {', '.join(TYPES)}",
            why=f"it is {x.dtype} on {x.device}" + ("" if x.is_contiguous() else ", not contiguous"),
        )
    return _TYPES[x.dtype]


def _check_shape(x: torch.Tensor, shape: tuple[int, ...], name: str) -> None:
    if x.shape != shape:
        raise NativeError(f"{name} must be {list(shape)}, not {list(x.shape)}")


def _free(free: Callable[[int], None], work: int, pool: WorkerPool) -> None:
    """Free a work; holding ``pool`` until then, because freeing waits for a call in flight."""
    free(work)


class ExpertsKernel:
    """Computes routed experts of any layer up to a size; at most one call in flight.

    Room is made once for ``rows`` rows with ``top`` experts each of layers up to ``hidden`` x ``width`` x ``experts``.
    """

    def __init__(self, pool: WorkerPool | None, *, hidden: int, width: int, experts: int, top: int, rows: int) -> None:
        self._pool = pool
        self._keep: tuple[object, ...] = ()  # what the call points into, until it is done
        self._call = CExpertsCall()
        self.address = ctypes.addressof(self._call)  # of the tm_experts_call: for host callbacks and bells
        if pool is not None:
            room = CExpertsRoom(hidden, width, experts, rows, top)
            self._call.work = pool.core.experts_work_new(pool.handle, ctypes.byref(room))
            if not self._call.work:
                raise NativeError(
                    "No room for an expert kernel", why=f"{rows} rows x {top} experts of {hidden} x {width}"
                )
            weakref.finalize(self, _free, pool.core.experts_work_free, self._call.work, pool)

    def prepare(
        self, layer: PackedExperts, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, out: torch.Tensor,
        *, many: bool = False,
    ) -> None:  # fmt: skip
        """Point the call at its tensors: hidden, out float [rows, hidden]; ids int64, weights float32 [rows, top]."""
        call, rows = self._call, len(hidden)
        _check_shape(hidden, (rows, layer.shape.hidden), "hidden")
        _check_shape(out, (rows, layer.shape.hidden), "out")
        _check_shape(weights, tuple(ids.shape), "weights")
        if ids.dtype != torch.int64 or not ids.is_contiguous() or ids.dim() != 2 or len(ids) != rows:
            raise NativeError("Expert ids must be contiguous int64 [rows, top]")
        if _type_of(weights, "weights"):
            raise NativeError("Routing weights must be float32")
        call.layer = ctypes.pointer(layer.c)
        call.rows, call.top = ids.shape
        call.many = many
        call.hidden_type, call.out_type = _type_of(hidden, "hidden"), _type_of(out, "out")
        call.hidden, call.out = hidden.data_ptr(), out.data_ptr()
        call.ids, call.weights = ids.data_ptr(), weights.data_ptr()
        self._keep = (layer, hidden, ids, weights, out)

    def submit(
        self, layer: PackedExperts, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, out: torch.Tensor,
        *, many: bool = False,
    ) -> None:  # fmt: skip
        """Start ``out = sum_k weights[:, k] * expert ids[:, k](hidden)``; negative ids are left out.

        ``many`` is for prefill: faster where an expert has 5 rows or more, but then the last bits of a row depend on
        how many share its experts. Without it rows are bit-equal in any company. The tensors stay the caller's, who
        may not change them before ``wait``. ``NativeError`` for tensors that do not fit and for ids that the layer
        does not have.
        """
        self.prepare(layer, hidden, ids, weights, out, many=many)
        if self._pool is not None:
            check_status(self._pool.core.experts_submit(self.address))
            return
        if int(ids.max()) >= len(layer.blobs):
            check_status(-1)
        out.copy_(reference.run_experts(layer, hidden, ids, weights))

    def wait(self) -> None:
        """Work until the submitted call is done."""
        if self._pool is not None:
            self._pool.core.experts_wait(self.address)
        self._keep = ()

    def run(
        self, layer: PackedExperts, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, out: torch.Tensor,
        *, many: bool = False,
    ) -> None:  # fmt: skip
        """``submit`` and ``wait``."""
        self.submit(layer, hidden, ids, weights, out, many=many)
        self.wait()


class LinearKernel:
    """Computes packed linear layers of up to ``cols`` inputs for up to ``tokens`` rows; at most one call in flight."""

    def __init__(self, pool: WorkerPool | None, *, cols: int, tokens: int) -> None:
        self._pool = pool
        self._keep: tuple[object, ...] = ()  # what the call points into
        self._call = CLinearCall()
        self.address = ctypes.addressof(self._call)
        if pool is not None:
            self._call.work = pool.core.linear_work_new(pool.handle, cols, tokens)
            if not self._call.work:
                raise NativeError("No room for a linear kernel", why=f"{tokens} rows of {cols}")
            weakref.finalize(self, _free, pool.core.linear_work_free, self._call.work, pool)

    def run(
        self, matrices: Sequence[PackedMatrix], x: torch.Tensor, outs: Sequence[torch.Tensor], *, many: bool = False
    ) -> None:
        """outs[i] = x @ matrices[i].T + bias, for up to 8 matrices that share x; outs float [tokens, rows].

        ``many`` as for experts: the faster kernels for 5 tokens and more.
        """
        if self._pool is None:
            for matrix, out in zip(matrices, outs, strict=True):
                out.copy_(reference.linear(matrix, x))
            return
        self.prepare(matrices, x, outs, many=many)
        self._pool.core.linear_run(self.address)
        check_status(self._call.status)

    def prepare(
        self, matrices: Sequence[PackedMatrix], x: torch.Tensor, outs: Sequence[torch.Tensor], *, many: bool = False
    ) -> None:
        """Point the call at its tensors, which must stay until it is done."""
        call = self._call
        self._keep = (tuple(matrices), x, tuple(outs))
        if not 0 < len(matrices) <= LINEAR_MATRICES or len({out.dtype for out in outs}) != 1:
            raise NativeError(f"A linear call takes 1 to {LINEAR_MATRICES} matrices with results of one type")
        call.count, call.tokens, call.many = len(matrices), len(x), many
        call.x, call.x_type = x.data_ptr(), _type_of(x, "x")
        for i, (matrix, out) in enumerate(zip(matrices, outs, strict=True)):
            layout = matrix.layout
            _check_shape(x, (len(x), layout.cols), "x")
            _check_shape(out, (len(x), layout.rows), "out")
            call.out_type = _type_of(out, "out")
            call.matrices[i] = matrix.c_linear(out.data_ptr())


__all__ = ["ExpertsKernel", "LinearKernel", "PackedExperts", "PackedMatrix", "open_pool"]
