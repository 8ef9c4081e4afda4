"""Packing is loss-free: planes mean, bit for bit, what GGUF blocks mean; both packers write the same bytes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.native.support import F16_FIELDS, QUANTISED, random_raw
from turbomoe.errors import ModelError
from turbomoe.native.layout import FORMATS, packed_layout
from turbomoe.native.packed import PackedMatrix, aligned_bytes, pack_into
from turbomoe.native.pool import WorkerPool
from turbomoe.native.repack import pack, unpack

SEEDS = st.integers(0, 2**32 - 1)


def wild_raw(rng: np.random.Generator, name: str, rows: int, cols: int) -> torch.Tensor:
    """Blocks of random bytes, every finite scale allowed: subnormal, huge, negative, zero."""
    f = FORMATS[name]
    raw = rng.integers(0, 256, (rows, cols // f.block, f.block_bytes), dtype=np.uint8)
    for at in F16_FIELDS.get(name, ()):
        raw[..., at + 1] &= np.where(raw[..., at + 1] & 0x7C == 0x7C, 0xBF, 0xFF).astype(np.uint8)
    if name == "MXFP4":
        raw[..., 0] %= 255
    return torch.from_numpy(raw.reshape(rows, -1))


def dequantised(raw: torch.Tensor, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        return gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[name])


@pytest.mark.parametrize("name", QUANTISED)
@given(seed=SEEDS, rows=st.integers(1, 5), blocks=st.integers(1, 20))
def test_planes_mean_what_blocks_mean(name: str, seed: int, rows: int, blocks: int) -> None:
    cols = blocks * FORMATS[name].block
    raw = wild_raw(np.random.default_rng(seed), name, rows, cols)
    values = unpack(pack(raw, name, rows, cols), name, rows, cols).numpy()
    np.testing.assert_array_equal(values.view(np.uint32), dequantised(raw, name).view(np.uint32))


@pytest.mark.parametrize("name", ["F16", "BF16", "F32"])
def test_float_planes_are_the_values(name: str) -> None:
    raw = random_raw(np.random.default_rng(1), name, 3, 37)
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[name]
    assert torch.equal(unpack(pack(raw, name, 3, 37), name, 3, 37), raw.view(dtype).float())


@pytest.mark.parametrize("name", sorted(FORMATS))
@given(seed=SEEDS, rows=st.integers(1, 130), blocks=st.integers(1, 12))
def test_c_packs_the_same_bytes(pool: WorkerPool, name: str, seed: int, rows: int, blocks: int) -> None:
    cols = blocks * FORMATS[name].block
    rng = np.random.default_rng(seed)
    raw = random_raw(rng, name, rows, cols) if FORMATS[name].is_float else wild_raw(rng, name, rows, cols)
    out = aligned_bytes(packed_layout(name, rows, cols).nbytes)
    out.fill_(0xA5)  # neither packer may count on a zeroed target
    pack_into(out, raw, name, rows, cols, pool)
    reference = pack(raw, name, rows, cols, torch.full_like(out, 0x5A))
    assert torch.equal(out, reference)


def break_scale(raw: torch.Tensor, name: str, row: int) -> None:
    """Make a scale of one row infinite or NaN, in the last block."""
    f = FORMATS[name]
    block = raw.view(len(raw), -1, f.block_bytes)[row, -1]
    if name == "MXFP4":
        block[0] = 255
    elif f.is_float:
        block[-2:] = torch.tensor([0x80, 0x7F] if name != "F16" else [0, 0x7C], dtype=torch.uint8)
    else:
        at = F16_FIELDS[name][-1]
        block[at : at + 2] = torch.tensor([0x01, 0xFC], dtype=torch.uint8)


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("row", [0, 99])
def test_scales_that_are_no_numbers_are_refused(pool: WorkerPool, name: str, row: int) -> None:
    raw = random_raw(np.random.default_rng(2), name, 100, 256)
    break_scale(raw, name, row)
    for packer in (None, pool):
        with pytest.raises(ModelError, match=f"Row {row} of a {name} matrix"):
            PackedMatrix.from_raw(raw, name, 100, 256, packer)


@pytest.mark.parametrize("missing", [-1, 1, 18])
def test_wrong_byte_counts_are_refused(pool: WorkerPool, missing: int) -> None:
    raw = torch.zeros(4 * 18 - missing, dtype=torch.uint8)
    for packer in (None, pool):
        with pytest.raises(ModelError, match="4 x 32 is 72 bytes"):
            PackedMatrix.from_raw(raw, "Q4_0", 4, 32, packer)
