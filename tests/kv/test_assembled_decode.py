"""The decode kernel with its assembly and what it reads ahead, on a CPU: ``ptx.py`` stands in for the assembler."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from tests.kv import ptx
from tests.kv.contract import Case, errors, filled, fresh, open_step
from turbomoe.kv.kernels import launch
from turbomoe.kv.kernels.layout import SCALAR_BITS, block
from turbomoe.kv.trellis_codebook import TRELLISES

BLOCKS = {
    each.text: each for name in (*SCALAR_BITS, *TRELLISES) for each in (block(name), block(name, for_scores=True))
}


class _Call:
    """What the interpreter asks of an inline assembly: one tensor by number."""

    def __init__(self, results: Sequence[np.ndarray], kind: tl.dtype) -> None:
        self.results, self.kind = results, kind

    def get_result(self, number: int) -> interpreter.TensorHandle:
        return interpreter.TensorHandle(self.results[number], self.kind)


def _assembled(self: object, text: str, constraints: str, values: list, types: object, pure: bool, pack: int) -> _Call:
    data = [value.data for value in values]
    if text.startswith("mov.b64"):
        return _Call([data[0].copy()], tl.int64)
    if text.startswith("lg2.approx"):
        return _Call([np.log2(data[0]).astype(np.float32)], tl.float32)
    shape = np.broadcast_shapes(*(np.shape(each) for each in data))
    words = [np.ascontiguousarray(np.broadcast_to(each, shape)).astype(np.int32).view(np.uint32) for each in data]
    return _Call([out.view(np.int32) for out in ptx.run(BLOCKS[text], words)], tl.int32)


@pytest.fixture(autouse=True)
def assembler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", _assembled)
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    monkeypatch.setattr(launch, "_launches_early", lambda device: False)


@pytest.mark.parametrize(
    ("dim", "k", "v", "lengths"),
    [
        (64, "tq2", "tq2", (0, 1, 40, 150, 300)),
        (128, "tq2", "tq3", (200, 3)),
        (256, "tq3", "tq4", (150,)),
        (256, "tq2", "tq2", (600, 41)),
        (64, "tcq2.5", "tcq3", (150, 0)),
        (256, "tcq2.5", "tcq2.5", (150,)),
        (128, "tcq4", "tcq2", (150,)),
        (256, "tcq3", "tcq2", (150,)),
        (128, "q8_0", "tq3", (150,)),
        (64, "tq4", "f16", (150,)),
    ],
)
def test_the_error_is_at_most_twice_that_of_plain_pytorch(dim: int, k: str, v: str, lengths: tuple[int, ...]) -> None:
    ours, plain = errors(Case(dim, 4, 2, k, v, lengths, dtype=torch.float16), launch.attend_one, "cpu")
    assert ours <= 2 * plain


@pytest.mark.parametrize(("dim", "k", "v"), [(64, "tcq3", "tq2"), (256, "tq3", "tq4"), (128, "tq4", "tcq2.5")])
def test_nothing_is_read_beyond_the_last_page_and_stale_rows_do_not_count(dim: int, k: str, v: str) -> None:
    case = Case(dim, 4, 2, k, v, (170,), means=False, dtype=torch.float16)
    clean, dirty = filled(case, "cpu"), filled(case, "cpu")
    coded = case.lengths[0] - case.sink - case.recent
    last = coded // 64
    for side in dirty.attention[0]:
        page = int(dirty.pages.table[0, last])
        side.planes[0][page, :, coded % 64 :] ^= 0x5A
        side.planes[1][page, :, coded % 64 :] = float("nan")
    step = open_step(dirty, [0])
    step.pages[0, last + 1 :] = 1 << 40
    new = fresh(case, 1, 1, torch.Generator().manual_seed(7), "cpu")
    expected = launch.attend_one(*new, *clean.attention[0], open_step(clean, [0]), 0.125)
    assert torch.equal(launch.attend_one(*new, *dirty.attention[0], step, 0.125), expected)
    assert expected.isfinite().all()
