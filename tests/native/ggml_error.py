"""The error of ggml's own kernels, recorded, on the very numbers that the matrix test gives to ours.

Recorded on 2026-11-24 with ggml-python 0.0.45 (ggml 0.15.3, built natively for AVX2), by

    python -m tests.native.ggml_error

which prints the table anew where ``ggml-python`` is installed. Tests do not need it.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from tests.native.support import columns_for, random_raw, relative_error
from turbomoe.native.repack import pack, unpack

ROWS, TOKENS = 256, (1, 5, 40)
# Relative L2 error against float64 of the same weights and exact activations, for each of TOKENS.
GGML_ERROR = {
    "Q4_0": (5.422e-03, 5.361e-03, 5.252e-03),
    "Q4_1": (4.126e-03, 4.620e-03, 5.302e-03),
    "Q5_0": (5.248e-03, 5.278e-03, 5.335e-03),
    "Q5_1": (5.386e-03, 5.118e-03, 5.305e-03),
    "Q8_0": (4.942e-03, 5.465e-03, 5.378e-03),
    "IQ4_NL": (5.434e-03, 5.382e-03, 5.256e-03),
    "MXFP4": (4.654e-03, 5.110e-03, 5.253e-03),
    "Q4_K": (5.934e-03, 7.435e-03, 6.483e-03),
    "Q5_K": (8.383e-03, 6.921e-03, 6.383e-03),
    "Q6_K": (6.721e-03, 6.532e-03, 6.943e-03),
    "F16": (2.009e-04, 2.018e-04, 2.070e-04),
    "BF16": (1.534e-03, 1.578e-03, 1.645e-03),
    "F32": (1.321e-07, 1.190e-07, 1.199e-07),
}


def case(name: str, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """GGUF blocks of a random [256, 1024] matrix, activations [tokens, 1024], and the exact product in float64."""
    rng, cols = np.random.default_rng(7), columns_for(name, 1024)
    raw = random_raw(rng, name, ROWS, cols)
    x = torch.from_numpy(rng.standard_normal((tokens, cols), dtype=np.float32))
    weight = unpack(pack(raw, name, ROWS, cols), name, ROWS, cols).double()
    return raw, x, x.double() @ weight.T


def ggml_product(name: str, raw: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """float32 [tokens, 256] by ggml's ``mul_mat`` on its CPU backend."""
    import ggml as g

    g.ggml_backend_cpu_buffer_type.restype = (
        ctypes.c_void_p
    )  # declared as a Python type, which ctypes takes for 32 bits
    g.ggml_backend_alloc_ctx_tensors.restype = ctypes.c_void_p
    backend = g.ggml_backend_cpu_init()
    context = g.ggml_init(g.ggml_init_params(mem_size=1 << 20, mem_buffer=None, no_alloc=True))
    weight = g.ggml_new_tensor_2d(context, getattr(g, f"GGML_TYPE_{name}"), x.shape[1], ROWS)
    inputs = g.ggml_new_tensor_2d(context, g.GGML_TYPE_F32, x.shape[1], len(x))
    product = g.ggml_mul_mat(context, weight, inputs)
    graph = g.ggml_new_graph(context)
    g.ggml_build_forward_expand(graph, product)
    g.ggml_backend_alloc_ctx_tensors(context, backend)
    for tensor, values in ((weight, raw), (inputs, x)):
        g.ggml_backend_tensor_set(tensor, ctypes.c_void_p(values.data_ptr()), 0, values.nbytes)
    g.ggml_backend_graph_compute(backend, graph)
    out = torch.empty(len(x), ROWS)
    g.ggml_backend_tensor_get(product, ctypes.c_void_p(out.data_ptr()), 0, out.nbytes)
    return out


def main() -> None:
    from turbomoe.native.layout import FORMATS

    for name in FORMATS:
        errors = []
        for tokens in TOKENS:
            raw, x, exact = case(name, tokens)
            errors.append(f"{relative_error(ggml_product(name, raw, x), exact):.3e}")
        print(f'    "{name}": ({", ".join(errors)}),')


if __name__ == "__main__":
    main()
