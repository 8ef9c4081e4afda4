"""Other kernels for the same expert layer, for ``cpu_experts.py``: ggml (PyPI ``ggml-python``) and PyTorch's int4.

A peer computes sum_k weight * down(silu(gate(x)) * up(x)) over routed experts, as our core does. Its constructor takes
the shape and the blocks of one expert, which every expert of the layer repeats at an address of its own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch

MATRICES = ("gate", "up", "down")


def aligned(nbytes: int) -> torch.Tensor:
    """Zeroed uint8 [nbytes] at a multiple of 64."""
    memory = torch.zeros(nbytes + 64, dtype=torch.uint8)
    start = -memory.data_ptr() % 64
    return memory[start : start + nbytes]


class GgmlLayer:
    """ggml's ``mul_mat_id`` on GGUF blocks in place: one graph for one number of rows."""

    def __init__(
        self, raw: Mapping[str, torch.Tensor], formats: Mapping[str, str], hidden: int, width: int, experts: int,
        top: int, rows: int,
    ) -> None:  # fmt: skip
        import ggml

        self.g, self.rows, self.hidden = ggml, rows, hidden
        # The package declares these as Python types, which ctypes takes for 32-bit results.
        for function in (ggml.ggml_backend_cpu_buffer_from_ptr, ggml.ggml_backend_cpu_buffer_type):
            function.restype = ctypes.c_void_p
        self.backend = ggml.ggml_backend_cpu_init()
        self.context = ggml.ggml_init(ggml.ggml_init_params(mem_size=16 << 20, mem_buffer=None, no_alloc=True))
        sizes = {"gate": (hidden, width), "up": (hidden, width), "down": (width, hidden)}
        self.memory: dict[str, torch.Tensor] = {}
        weights = {n: self._weight(n, formats[n], sizes[n], experts, raw[n]) for n in MATRICES}
        self._build(weights, top)

    def _weight(self, name: str, format: str, size: tuple[int, int], experts: int, raw: torch.Tensor) -> object:
        g = self.g
        tensor = g.ggml_new_tensor_3d(self.context, getattr(g, f"GGML_TYPE_{format}"), *size, experts)
        memory = aligned(raw.numel() * experts)
        memory.view(experts, -1)[:] = raw.flatten()
        buffer = g.ggml_backend_cpu_buffer_from_ptr(ctypes.c_void_p(memory.data_ptr()), memory.numel())
        g.ggml_backend_tensor_alloc(buffer, tensor, ctypes.c_void_p(memory.data_ptr()))
        self.memory[name] = memory
        return tensor

    def _build(self, weights: dict[str, object], top: int) -> None:
        g, c = self.g, self.context
        self.x = g.ggml_new_tensor_3d(c, g.GGML_TYPE_F32, self.hidden, 1, self.rows)
        self.ids = g.ggml_new_tensor_2d(c, g.GGML_TYPE_I32, top, self.rows)
        self.route = g.ggml_new_tensor_3d(c, g.GGML_TYPE_F32, 1, top, self.rows)
        gate = g.ggml_mul_mat_id(c, weights["gate"], self.x, self.ids)
        up = g.ggml_mul_mat_id(c, weights["up"], self.x, self.ids)
        down = g.ggml_mul_mat_id(c, weights["down"], g.ggml_swiglu_split(c, gate, up), self.ids)
        terms = g.ggml_mul(c, down, self.route)
        step = 4 * self.hidden
        views = [g.ggml_view_2d(c, terms, self.hidden, self.rows, top * step, k * step) for k in range(top)]
        self.out = views[0]
        for view in views[1:]:
            self.out = g.ggml_add(c, self.out, view)
        for tensor in (self.x, self.ids, self.route):
            g.ggml_set_input(tensor)
        g.ggml_set_output(self.out)
        self.graph = g.ggml_new_graph(c)
        g.ggml_build_forward_expand(self.graph, self.out)
        self.allocator = g.ggml_gallocr_new(g.ggml_backend_cpu_buffer_type())
        g.ggml_gallocr_alloc_graph(self.allocator, self.graph)

    def set_threads(self, threads: int) -> None:
        self.g.ggml_backend_cpu_set_n_threads(self.backend, threads)

    def prepare(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        self._set(self.x, hidden)
        self._set(self.ids, ids.to(torch.int32))
        self._set(self.route, weights)

    def run(self) -> None:
        self.g.ggml_backend_graph_compute(self.backend, self.graph)

    def result(self) -> torch.Tensor:
        out = torch.empty(self.rows, self.hidden)
        self.g.ggml_backend_tensor_get(self.out, ctypes.c_void_p(out.data_ptr()), 0, out.nbytes)
        return out

    def close(self) -> None:
        """Free what ggml allocated; the weights are ours."""
        self.g.ggml_gallocr_free(self.allocator)
        self.g.ggml_free(self.context)
        self.g.ggml_backend_free(self.backend)

    def _set(self, tensor: object, values: torch.Tensor) -> None:
        values = values.contiguous()
        self.g.ggml_backend_tensor_set(tensor, ctypes.c_void_p(values.data_ptr()), 0, values.nbytes)


class TorchInt4Layer:
    """PyTorch's int4 CPU kernel, groups of 32, bf16 scales and zeros: its own packing of its own rounding."""

    def __init__(self, weights: Mapping[str, torch.Tensor], experts: int) -> None:
        packed = {name: self._pack(weight) for name, weight in weights.items()}
        self.experts = [{n: (p.clone(), s.clone()) for n, (p, s) in packed.items()} for _ in range(experts)]

    @staticmethod
    def _pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        groups = weight.unflatten(1, (-1, 32))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = (high - low).clamp(min=1e-8) / 15
        codes = ((groups - low) / scale).round().clamp(0, 15).to(torch.int32).flatten(1)
        factors = torch.cat((scale, low + 8 * scale), dim=-1).to(torch.bfloat16)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        return packed, factors.transpose(0, 1).contiguous()

    @property
    def nbytes(self) -> int:
        """Bytes of one expert."""
        return sum(p.nbytes + s.nbytes for p, s in self.experts[0].values())

    def set_threads(self, threads: int) -> None:
        torch.set_num_threads(threads)

    def prepare(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        self.x, self.weights = hidden.to(torch.bfloat16), weights
        self.groups = [(e, *(ids == e).nonzero(as_tuple=True)) for e in ids.unique().tolist()]
        self.out = torch.zeros_like(hidden)

    def run(self) -> None:
        self.out.zero_()
        for index, rows, places in self.groups:
            expert, x = self.experts[index], self.x[rows]
            gate, up = self._mm(x, expert["gate"]), self._mm(x, expert["up"])
            term = self._mm(torch.nn.functional.silu(gate) * up, expert["down"])
            self.out.index_add_(0, rows, term.float() * self.weights[rows, places].unsqueeze(1))

    def result(self) -> torch.Tensor:
        return self.out

    def close(self) -> None:
        """Nothing to give back: the experts live as long as the layer."""

    @staticmethod
    def _mm(x: torch.Tensor, matrix: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        packed, factors = matrix
        result: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 32, factors)
        return result
