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
from turbomoe.kv.kernels.layout import SCALAR_BITS, block, column_dims, table, value_pairs
from turbomoe.kv.kernels.plane_assembly import level_tables, planes
from turbomoe.kv.trellis_codebook import TRELLISES, UNIT, Trellis, codebook


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("name", SCALAR_BITS)
def test_scalar_codes_find_their_levels(name: str, dim: int) -> None:
    """Every byte of codes, as the kernel hands words over: exact, as far as a half holds a level."""
    codec = make_codec(name, dim)
    codes = np.random.default_rng(1).integers(0, 256, (500, codec.planes[0].width), dtype=np.uint8)
    expected = codec.decode((torch.from_numpy(codes), torch.ones(500, 1, dtype=torch.float16))).half().double().numpy()
    words, groups = codes.view(np.uint32), dim // (8 if name == "tq4" else 16)
    dims = column_dims(name, dim, True, 1)[0].numpy()
    found = np.empty_like(expected)
    own = max(1, min(4, groups // 4))
    tables = table(name)[1 << SCALAR_BITS[name] :].numpy().view(np.uint32)
    for group in range(groups):
        inputs = [words[:, group]]
        if name == "tq3":
            inputs.append(words[:, dim // 16 + group % (dim // 32)] >> (group // (dim // 32)))
        found_tables = tables[::2] if name == "tq2" else tables
        registers = ptx.run(block(name), [*inputs, *(np.full(len(words), each) for each in found_tables)])
        threads = groups // own
        for r, register in enumerate(registers):
            column = 2 * ((group % own * len(registers) + r) * threads + group // own)
            found[:, dims[column : column + 2]] = ptx.halves(register)
    assert np.array_equal(found, expected)


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


@pytest.mark.parametrize("name", TRELLISES)
def test_trellis_windows_find_their_values(name: str) -> None:
    """Random streams: the values that the table has for every window of a group, in the lanes of ``value_pairs``."""
    trellis = TRELLISES[name]
    read, count = (read_plane_by_plane, 10) if name == "tcq2.5" else (read_word_by_word, trellis.group_words + 1)
    words = np.random.default_rng(1).integers(0, 1 << 32, (count, 3000), dtype=np.uint32)
    held = table(name)[trellis.values * trellis.states :].numpy().view(np.uint32)
    made = block(name)
    registers = ptx.run(made, [*words, *(np.full(3000, each) for each in held[: made.inputs - count])])
    values_of, seen, pairs = codebook(trellis).double().numpy(), set(), value_pairs(trellis)
    steps = 32 * trellis.group_words // trellis.step_bits
    assert sorted(itertools.chain(*pairs)) == list(range(steps * trellis.values))
    for register, pair in zip(registers, pairs, strict=True):
        for lane, place in enumerate(pair):
            step, value = divmod(place, trellis.values)
            window = read(words, trellis, step)
            assert np.array_equal(ptx.halves(register)[:, lane], values_of[value, window])
            seen.update(window.tolist())
    assert len(seen) == trellis.states


def test_signed_bytes_are_the_values() -> None:
    """Four a register: two neighbouring pairs of the halves."""
    trellis = TRELLISES["tcq2.5"]
    words = np.random.default_rng(2).integers(0, 1 << 32, (10, 3000), dtype=np.uint32)
    low, high, whole = np.frombuffer(level_tables(trellis), np.uint32).reshape(3, 2)
    tables = [[np.full(3000, each) for each in table] for table in (low, high, whole)]
    halves = ptx.run(planes(trellis), [*words, *tables[0], *tables[1]])
    signed = ptx.run(planes(trellis, as_bytes=True), [*words, *tables[2]])
    assert len(halves) == 2 * len(signed)
    for number, register in enumerate(signed):
        values = (2.0 * register.view(np.int8).reshape(-1, 4) + 1) * UNIT / 2
        assert np.array_equal(values, np.concatenate([ptx.halves(each) for each in halves[2 * number :][:2]], 1))
