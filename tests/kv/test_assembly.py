"""The inline assembly, instruction by instruction on a CPU: its values are those of the codecs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kv import ptx
from turbomoe.kv.codecs import make_codec
from turbomoe.kv.kernels.layout import SCALAR_BITS, block, column_dims, step_pairs, table
from turbomoe.kv.trellis_codebook import TRELLISES, codebook


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


@pytest.mark.parametrize("name", TRELLISES)
def test_trellis_windows_find_their_values(name: str) -> None:
    """Random streams: the values that the table has for every window of a group, in the lanes of ``step_pairs``."""
    trellis = TRELLISES[name]
    words = np.random.default_rng(1).integers(0, 1 << 32, (trellis.group_words + 1, 3000), dtype=np.uint32)
    held = table(name)[trellis.values * trellis.states :].numpy().view(np.uint32)
    registers = ptx.run(block(name), [*words, *(np.full(3000, each) for each in held)])
    values_of, stream = codebook(trellis).double().numpy(), words.astype(object)
    bits = sum(word << 32 * i for i, word in enumerate(stream))
    seen = set()
    for register, steps in zip(registers, step_pairs(trellis), strict=True):
        for lane, step in enumerate(steps):
            window = (bits >> step * trellis.step_bits & (trellis.states - 1)).astype(np.int64)
            values = values_of[lane if trellis.values == 2 else 0, window]
            assert np.array_equal(ptx.halves(register)[:, lane], values)
            seen.update(window.tolist())
    assert len(seen) == trellis.states
