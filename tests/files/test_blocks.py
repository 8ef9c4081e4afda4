"""Block formats against the ``gguf`` package, bit by bit. A new line in ``FORMATS`` is tested by every test here."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turbomoe.errors import ModelError
from turbomoe.files import blocks
from turbomoe.files.blocks import FORMATS, dequantise, packed_bytes, row_bytes

NAMES = sorted(FORMATS)
# Where the fp16 scales of a block lie.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip


def random_blocks(name: str, count: int, seed: int = 0) -> np.ndarray:
    """uint8 [count, block bytes]: every bit pattern is a valid block, infinite and not-a-number scales included."""
    return np.random.default_rng(seed).integers(0, 256, (count, FORMATS[name].bytes), dtype=np.uint8)


def oracle(name: str, packed: np.ndarray) -> np.ndarray:
    """float32 [rows, values] from uint8 [rows, bytes]."""
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[name])


def assert_same_bits(ours: torch.Tensor, theirs: np.ndarray) -> None:
    """Equal bit patterns, the sign of zero included; any not-a-number equals any other."""
    ours_np, theirs = ours.numpy().reshape(-1), np.ascontiguousarray(theirs).reshape(-1)
    assert ours_np.dtype == theirs.dtype == np.float32
    same = ours_np.view(np.uint32) == theirs.view(np.uint32)
    same |= np.isnan(ours_np) & np.isnan(theirs)
    assert same.all(), f"{(~same).sum()} of {same.size} values differ, the first at {np.argmin(same)}"


def test_the_formats_of_the_issue_are_there() -> None:
    asked_for = {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "MXFP4"}
    assert asked_for <= FORMATS.keys()


@pytest.mark.parametrize("name", NAMES)
def test_numbers_and_sizes_are_those_of_gguf(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    block = FORMATS[name]
    assert (block.type_id, block.values, block.bytes) == (kind.value, *gguf.GGML_QUANT_SIZES[kind])


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 9), per_row=st.integers(1, 9))
def test_random_blocks_are_bit_equal(name: str, seed: int, rows: int, per_row: int) -> None:
    packed = random_blocks(name, rows * per_row, seed).reshape(rows, -1)
    shape = (rows, per_row * FORMATS[name].values)
    numbers = dequantise(torch.from_numpy(packed).view(-1), name, shape)
    assert numbers.shape == shape
    assert_same_bits(numbers, oracle(name, packed))


@pytest.mark.parametrize("name", sorted(HALVES))
def test_every_half_precision_scale_is_bit_equal(name: str) -> None:
    packed = random_blocks(name, 1 << 16)
    every = np.arange(1 << 16, dtype=np.uint16)
    for place, start in enumerate(HALVES[name]):
        packed[:, start : start + 2] = np.roll(every, 4099 * place).view(np.uint8).reshape(-1, 2)
    numbers = dequantise(torch.from_numpy(packed).view(-1), name, (len(packed), FORMATS[name].values))
    assert_same_bits(numbers, oracle(name, packed))


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_every_short_float_is_bit_equal(name: str) -> None:
    packed = np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(256, 512)
    assert_same_bits(dequantise(torch.from_numpy(packed).view(-1), name, (256, 256)), oracle(name, packed))


def test_every_mxfp4_scale_with_every_code_is_bit_equal() -> None:
    scales, codes = np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8)
    packed = np.empty((256, 16, 17), dtype=np.uint8)
    packed[:, :, 0], packed[:, :, 1:] = scales[:, None], codes.reshape(16, 16)
    packed = packed.reshape(-1, 17)
    assert_same_bits(dequantise(torch.from_numpy(packed).view(-1), "MXFP4", (4096, 32)), oracle("MXFP4", packed))


@pytest.mark.parametrize("name", NAMES)
def test_chunks_do_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = random_blocks(name, 37)
    monkeypatch.setattr(blocks, "CHUNK_VALUES", 4 * FORMATS[name].values)
    numbers = dequantise(torch.from_numpy(packed).view(-1), name, (37, FORMATS[name].values))
    assert_same_bits(numbers, oracle(name, packed))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shift", [1, 2, 3, 5])
def test_bytes_may_lie_anywhere(name: str, shift: int) -> None:
    packed = random_blocks(name, 6)
    odd = torch.zeros(packed.size + 8, dtype=torch.uint8)[shift : shift + packed.size]
    odd.copy_(torch.from_numpy(packed).view(-1))
    assert_same_bits(dequantise(odd, name, (6, FORMATS[name].values)), oracle(name, packed))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_the_float32_numbers_rounded_once(name: str, dtype: torch.dtype) -> None:
    packed = torch.from_numpy(random_blocks(name, 300)).view(-1)
    shape = (300, FORMATS[name].values)
    found = dequantise(packed, name, shape, dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found, dequantise(packed, name, shape).to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_result_is_fresh_and_the_bytes_stay(name: str, dtype: torch.dtype) -> None:
    packed = torch.from_numpy(random_blocks(name, 4)).view(-1)
    before = packed.clone()
    dequantise(packed, name, (4 * FORMATS[name].values,), dtype).zero_()
    assert torch.equal(packed, before)


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_counted_in_blocks(name: str) -> None:
    block = FORMATS[name]
    assert row_bytes(name, 3 * block.values) == 3 * block.bytes
    assert packed_bytes(name, (2, 5, 3 * block.values)) == 30 * block.bytes
    if block.values > 1:
        with pytest.raises(ModelError, match=rf"{block.values + 1} values cannot be stored as {name}"):
            row_bytes(name, block.values + 1)


@pytest.mark.parametrize("name", NAMES)
def test_no_rows_give_no_values(name: str) -> None:
    assert dequantise(torch.empty(0, dtype=torch.uint8), name, (0, 256)).shape == (0, 256)


def test_a_scalar_has_one_value() -> None:
    assert dequantise(torch.tensor([0, 0, 128, 63], dtype=torch.uint8), "F32", ()).item() == 1.0


@pytest.mark.parametrize(
    ("raw", "name", "shape", "says"),
    [
        (torch.zeros(18, dtype=torch.uint8), "IQ4_XS", (32,), "'IQ4_XS' is not supported"),
        (torch.zeros(17, dtype=torch.uint8), "Q4_0", (32,), "takes 18 bytes"),
        (torch.zeros(19, dtype=torch.uint8), "Q4_0", (32,), "takes 18 bytes"),
        (torch.zeros(18, dtype=torch.int8), "Q4_0", (32,), "int8"),
        (torch.zeros(1, 18, dtype=torch.uint8), "Q4_0", (32,), r"\(1, 18\)"),
        (torch.zeros(36, dtype=torch.uint8), "Q4_0", (4, 16), "row of 16 values"),
    ],
    ids=["unknown format", "too few bytes", "too many bytes", "not bytes", "two axes", "half a block a row"],
)
def test_what_does_not_fit_is_refused(raw: torch.Tensor, name: str, shape: tuple[int, ...], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        dequantise(raw, name, shape)
