"""The inline assembly, instruction by instruction on a CPU: its values are those of the codecs."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.kv import ptx
from tests.kv.ptx import Words
from turbomoe.kv.codecs import make_codec
from turbomoe.kv.kernels.layout import SCALAR_BITS, block, byte_offset, byte_unit, column_dims, table, value_pairs
from turbomoe.kv.trellis_codebook import TRELLISES, Trellis, codebook


def values_of(registers: list[ptx.Words], name: str, for_scores: bool) -> np.ndarray:
    """By register and lane: of keys the bytes, from their offset and in their unit."""
    if not for_scores:
        return np.stack([ptx.halves(register) for register in registers], 1)
    doubled = 2 * np.stack([ptx.bytes_of(register) for register in registers], 1) + byte_offset(name)
    return doubled * (byte_unit(name) / 2)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("for_scores", [False, True])
@pytest.mark.parametrize("name", SCALAR_BITS)
def test_scalar_codes_find_their_levels(name: str, for_scores: bool, dim: int) -> None:
    """Every byte of codes, as the kernel hands words over: exact, as far as a half or a float holds a level."""
    codec = make_codec(name, dim)
    codes = np.random.default_rng(1).integers(0, 256, (500, codec.planes[0].width), dtype=np.uint8)
    expected = codec.decode((torch.from_numpy(codes), torch.ones(500, 1, dtype=torch.float16)))
    expected = expected.numpy() if for_scores else expected.half().double().numpy()
    words, groups = codes.view(np.uint32), dim // (8 if name == "tq4" else 16)
    dims = column_dims(name, dim, for_scores, 1)[0].numpy()
    found = np.empty(expected.shape)
    tables = table(name, for_scores)[1 << SCALAR_BITS[name] :].numpy().view(np.uint32)
    if not for_scores and name == "tq2":
        tables = tables[::2]
    for group in range(groups):
        inputs = [words[:, group]]
        if name == "tq3":
            inputs.append(words[:, dim // 16 + group % (dim // 32)] >> (group // (dim // 32)))
        held = tables[: block(name, for_scores).inputs - len(inputs)]
        registers = ptx.run(block(name, for_scores), [*inputs, *(np.full(len(words), each) for each in held)])
        values = values_of(registers, name, for_scores)
        for register, lane in np.ndindex(values.shape[1:]):
            column = _column(values.shape[1:], groups, group, register, for_scores) + lane
            found[:, dims[column]] = values[:, register, lane]
    assert np.array_equal(found.astype(expected.dtype), expected)


def _column(shape: tuple[int, ...], groups: int, group: int, register: int, for_scores: bool) -> int:
    """Of the first lane: a thread holds ``own`` neighbouring groups; see ``layout.column_dims``."""
    registers, lanes = shape
    own = max(1, min(4, groups // 4))
    threads, each = groups // own, own * registers
    thread, place = group // own, group % own * registers + register
    if for_scores:
        return lanes * (place * threads + thread)
    run = min(8, each)
    return lanes * ((place // run * threads + thread) * run + place % run)


def read_word_by_word(words: Words, trellis: Trellis, step: int) -> npt.NDArray[np.int64]:
    """The window of a step in a group and the words after it: [group_words + 1, n]."""
    bits = sum(word << 32 * i for i, word in enumerate(words.astype(object)))
    found: npt.NDArray[np.int64] = (bits >> step * trellis.step_bits & (trellis.states - 1)).astype(np.int64)
    return found


def read_plane_by_plane(words: Words, trellis: Trellis, step: int) -> npt.NDArray[np.int64]:
    """As above, of the planes of two groups: [2 * group_words, n]."""
    pairs = zip(words[: trellis.step_bits], words[trellis.step_bits :], strict=True)
    both = [one.astype(np.int64) | following.astype(np.int64) << 32 for one, following in pairs]
    bits = [plane >> step + i & 1 for i in (0, 1) for plane in both]
    return np.sum([bit << place for place, bit in enumerate(bits)], 0)


@pytest.mark.parametrize("for_scores", [False, True])
@pytest.mark.parametrize("name", TRELLISES)
def test_trellis_windows_find_their_values(name: str, for_scores: bool) -> None:
    """Random streams: the values that the table has for every window of a group, in the lanes of ``value_pairs``."""
    trellis = TRELLISES[name]
    read, count = (read_plane_by_plane, 10) if name == "tcq2.5" else (read_word_by_word, trellis.group_words + 1)
    words = np.random.default_rng(1).integers(0, 1 << 32, (count, 3000), dtype=np.uint32)
    held = table(name)[trellis.values * trellis.states :].numpy().view(np.uint32)
    made = block(name, for_scores)
    if name == "tcq2.5" and for_scores:
        held = held[4:]
    registers = ptx.run(made, [*words, *(np.full(3000, each) for each in held[: made.inputs - count])])
    table_of, seen, pairs = codebook(trellis).double().numpy(), set(), value_pairs(trellis)
    steps = 32 * trellis.group_words // trellis.step_bits
    assert sorted(itertools.chain(*pairs)) == list(range(steps * trellis.values))
    values = values_of(registers, name, for_scores).reshape(3000, -1, 2)
    for found, pair in zip(values.swapaxes(0, 1), pairs, strict=True):
        for lane, place in enumerate(pair):
            step, value = divmod(place, trellis.values)
            window = read(words, trellis, step)
            assert np.array_equal(found[:, lane], table_of[value, window])
            seen.update(window.tolist())
    assert len(seen) == trellis.states
