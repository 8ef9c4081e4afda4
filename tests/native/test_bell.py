"""The bell: work started by a flag in memory, answered in memory, by a thread that is no Python thread."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from tests.native.support import random_experts, random_matrix, random_routing
from turbomoe.native.bell import ANSWER, BELL_BYTES, ERRAND, RING, STATUS, Bell
from turbomoe.native.kernels import ExpertsKernel, LinearKernel
from turbomoe.native.library import NativeError
from turbomoe.native.packed import aligned_bytes
from turbomoe.native.pool import WorkerPool


class Device:
    """Rings as a GPU kernel would: plain stores to the words, then a look at the answer."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.words = memory.numpy().view(np.uint32)
        self.rung = 0

    def ring(self, errand: int) -> int:
        self.rung += 1
        self.words[ERRAND // 4] = errand
        self.words[RING // 4] = self.rung
        give_up = time.monotonic() + 30
        while self.words[ANSWER // 4] != self.rung:
            assert time.monotonic() < give_up, "the bell was not answered"
        return int(self.words.view(np.int32)[STATUS // 4])


@pytest.mark.parametrize("hot_us", [0, 100_000])
def test_prepared_kernels_run_when_rung(pool: WorkerPool, hot_us: int) -> None:
    rng = np.random.default_rng(0)
    layer = random_experts(rng, 4, 64, 96, dict.fromkeys(("gate", "up", "down"), "Q8_0"), pool=pool)
    matrix = random_matrix(rng, "Q4_K", 40, 256, pool)
    experts = ExpertsKernel(pool, hidden=64, width=96, experts=4, top=2, rows=1)
    linear = LinearKernel(pool, cols=256, tokens=1)
    hidden, out, x, y = torch.randn(1, 64), torch.empty(1, 64), torch.randn(1, 256), torch.empty(1, 40)
    ids, weights = random_routing(rng, 4, 1, 2)
    experts.run(layer, hidden, ids, weights, out)
    linear.run([matrix], x, [y])
    want_out, want_y = out.clone(), y.clone()
    experts.prepare(layer, hidden, ids, weights, out)
    linear.prepare([matrix], x, [y])

    memory = aligned_bytes(BELL_BYTES)
    bell, device = Bell(pool, memory, [experts, linear], hot_us), Device(memory)
    for _ in range(20):
        out.zero_(), y.zero_()
        assert device.ring(0) == 0 and torch.equal(out, want_out)
        assert device.ring(1) == 0 and torch.equal(y, want_y)
    other, _ = random_routing(np.random.default_rng(5), 4, 1, 2)
    ids.copy_(other)  # the device routes anew between rings
    assert device.ring(0) == 0
    fresh = torch.empty(1, 64)
    ExpertsKernel(pool, hidden=64, width=96, experts=4, top=2, rows=1).run(layer, hidden, ids, weights, fresh)
    assert torch.equal(out, fresh)
    ids[0, 0] = 99
    assert device.ring(0) == -1
    assert device.ring(7) == -5
    bell.close()


def test_memory_of_a_bell_is_checked(pool: WorkerPool) -> None:
    memory = aligned_bytes(BELL_BYTES + 64)
    for bad in (memory[:64], memory[1 : 1 + BELL_BYTES], memory):
        with pytest.raises(NativeError, match="128 bytes"):
            Bell(pool, bad, [])
