"""The packed layout: Python and C agree on every byte, planes are aligned and apart, growth is what the page says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbomoe.errors import ModelError
from turbomoe.native.layout import ALIGN, FORMATS, STEP, packed_layout
from turbomoe.native.library import Core

NAMES = sorted(FORMATS)
# Bits a value that a wide matrix takes: (packed, in GGUF blocks).
BITS = {
    "Q4_0": (4.5, 4.5), "Q4_1": (5.0, 5.0), "Q5_0": (5.5, 5.5), "Q5_1": (6.0, 6.0), "Q8_0": (8.5, 8.5),
    "IQ4_NL": (4.5, 4.5), "MXFP4": (4.25, 4.25), "Q4_K": (4.625, 4.5), "Q5_K": (5.625, 5.5), "Q6_K": (6.5625, 6.5625),
    "F16": (16, 16), "BF16": (16, 16), "F32": (32, 32),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_bits_per_value(name: str) -> None:
    f = FORMATS[name]
    assert f.bits_per_value == BITS[name][0]
    assert 8 * f.block_bytes / f.block == BITS[name][1]


@pytest.mark.parametrize("name", NAMES)
def test_wide_matrices_have_no_padding(name: str) -> None:
    layout = packed_layout(name, 1024, 4096)
    assert layout.nbytes == 1024 * 4096 * BITS[name][0] / 8
    assert layout.growth == BITS[name][0] / BITS[name][1]


@given(st.sampled_from(NAMES), st.integers(1, 300), st.integers(1, 40))
def test_planes_are_aligned_apart_and_padded(name: str, rows: int, blocks: int) -> None:
    layout = packed_layout(name, rows, blocks * FORMATS[name].block)
    at = 0
    for plane in layout.planes.values():
        assert plane.offset == at and at % ALIGN == 0
        slack = plane.nbytes - rows * plane.row_bytes
        assert 0 <= slack < 2 * ALIGN
        # A kernel may read one vector of fp16 scales beyond the last row: 32 bytes.
        assert layout.cols % STEP == 0 or slack >= 32
        at += plane.nbytes
    assert layout.nbytes == at


@given(st.sampled_from(NAMES), st.integers(1, 100_000), st.integers(1, 20_000))
def test_c_counts_the_same_bytes(core: Core, name: str, rows: int, cols: int) -> None:
    f = FORMATS[name]
    counted = core.packed_bytes(f.index, rows, cols)
    if cols % f.block:
        assert counted == 0
        return
    assert counted == packed_layout(name, rows, cols).nbytes


@pytest.mark.parametrize(
    ("name", "rows", "cols"),
    [("Q4_0", 0, 32), ("Q4_0", 1, 0), ("Q4_0", 1, 31), ("Q4_K", 4, 288), ("Q8_0", -1, 32), ("F16", 1, 1 << 25)],
)
def test_impossible_shapes(core: Core, name: str, rows: int, cols: int) -> None:
    with pytest.raises(ModelError, match=f"{name} matrix of {rows} x {cols}"):
        packed_layout(name, rows, cols)
    assert core.packed_bytes(FORMATS[name].index, rows, cols) == 0


def test_unknown_format(core: Core) -> None:
    with pytest.raises(ModelError, match="no format Q3_K"):
        packed_layout("Q3_K", 1, 256)
    assert core.packed_bytes(-1, 1, 256) == core.packed_bytes(len(FORMATS), 1, 256) == 0
