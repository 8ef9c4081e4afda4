"""Random weights for the tests of the C core: GGUF blocks with sane scales, packed matrices, packed experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from turbomoe.native.layout import FORMATS, packed_layout
from turbomoe.native.packed import PackedExperts, PackedMatrix, aligned_bytes, expert_shape, pack_expert
from turbomoe.native.pool import WorkerPool

QUANTISED = [name for name, f in FORMATS.items() if not f.is_float]
# Byte offsets of the fp16 factors in a block.
F16_FIELDS = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "IQ4_NL": (0,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip


def random_raw(rng: np.random.Generator, name: str, rows: int, cols: int) -> torch.Tensor:
    """uint8 [rows, bytes per row]: every code and scale bit random, fp16 factors in a range that models have."""
    f = FORMATS[name]
    if f.is_float:
        values = torch.from_numpy(rng.standard_normal((rows, cols), dtype=np.float32) * 0.05)
        dtype = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[name]
        return values.to(dtype).view(torch.uint8).view(rows, -1)
    raw = rng.integers(0, 256, (rows, cols // f.block, f.block_bytes), dtype=np.uint8)
    for at in F16_FIELDS.get(name, ()):
        factor = (rng.random(raw.shape[:2]) * 0.01 + 0.001) * rng.choice([-1, 1], raw.shape[:2])
        raw[..., at : at + 2] = factor.astype(np.float16)[..., None].view(np.uint8)
    if name == "MXFP4":
        raw[..., 0] = rng.integers(118, 124, raw.shape[:2])
    return torch.from_numpy(raw.reshape(rows, -1))


def random_matrix(
    rng: np.random.Generator, name: str, rows: int, cols: int, pool: WorkerPool | None = None, *, bias: bool = False
) -> PackedMatrix:
    """A packed random matrix, perhaps with a bias."""
    values = torch.from_numpy(rng.standard_normal(rows, dtype=np.float32)) if bias else None
    return PackedMatrix.from_raw(random_raw(rng, name, rows, cols), name, rows, cols, pool, values)


def random_experts(
    rng: np.random.Generator,
    count: int,
    hidden: int,
    width: int,
    formats: Mapping[str, str],
    activation: str = "silu",
    biases: Sequence[str] = (),
    pool: WorkerPool | None = None,
) -> PackedExperts:
    """A layer of packed random experts."""
    shape = expert_shape(hidden, width, formats, activation, biases)
    blobs = []
    for _ in range(count):
        raw = {n: random_raw(rng, formats[n], layout.rows, layout.cols) for n, layout in shape.layouts.items()}
        for bias in biases:
            rows = shape.layouts[bias.removesuffix("_bias")].rows
            raw[bias] = torch.from_numpy(rng.standard_normal(rows, dtype=np.float32) * 0.1)
        blobs.append(aligned_bytes(shape.nbytes))
        pack_expert(shape, raw, blobs[-1], pool)
    return PackedExperts(shape, blobs)


def random_routing(
    rng: np.random.Generator, experts: int, rows: int, top: int, skipped: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids int64 [rows, top], distinct within a row, a share of them -1; weights float32 that sum to 1."""
    ids = np.stack([rng.permutation(experts)[:top] for _ in range(rows)])
    ids[rng.random(ids.shape) < skipped] = -1
    weights = rng.random((rows, top), dtype=np.float32) + 0.1
    return torch.from_numpy(ids), torch.from_numpy(weights / weights.sum(1, keepdims=True))


def columns_for(name: str, cols: int) -> int:
    """The nearest width not below ``cols`` that whole blocks of a format fill."""
    block = packed_layout(name, 1, FORMATS[name].block).format.block
    return -(-cols // block) * block


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """L2 norm of the difference over that of ``want``."""
    return float((got.double() - want.double()).norm() / want.double().norm())
