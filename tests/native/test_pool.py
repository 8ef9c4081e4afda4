"""The worker pool: many pools, many threads, many tasks in flight, fork, exit, and how many threads there should be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.native.support import random_experts, random_matrix, random_routing
from turbomoe.native import pool as pool_module
from turbomoe.native.kernels import ExpertsKernel, LinearKernel
from turbomoe.native.library import Core, NativeError
from turbomoe.native.packed import PackedExperts
from turbomoe.native.pool import WorkerPool

FORMATS = dict.fromkeys(("gate", "up", "down"), "Q4_0")
Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def layer(pool: WorkerPool) -> PackedExperts:
    return random_experts(np.random.default_rng(0), 8, 256, 128, FORMATS, pool=pool)


def case(seed: int, rows: int = 2) -> Case:
    rng = np.random.default_rng(seed)
    return (torch.from_numpy(rng.standard_normal((rows, 256), dtype=np.float32)), *random_routing(rng, 8, rows, 3))


def kernel(pool: WorkerPool) -> ExpertsKernel:
    return ExpertsKernel(pool, hidden=256, width=128, experts=8, top=3, rows=8)


def expected(core: Core, layer: PackedExperts, cases: list[Case]) -> list[torch.Tensor]:
    lone = kernel(WorkerPool(core, 1))
    outs = [torch.empty_like(c[0]) for c in cases]
    for c, out in zip(cases, outs, strict=True):
        lone.run(layer, *c, out)
    return outs


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_any_number_of_threads(core: Core, layer: PackedExperts, threads: int) -> None:
    cases = [case(seed, rows=1 + seed % 8) for seed in range(40)]
    k = kernel(WorkerPool(core, threads, hot_us=0 if threads == 8 else 100))
    for c, want in zip(cases, expected(core, layer, cases), strict=True):
        out = torch.empty_like(c[0])
        k.run(layer, *c, out)
        assert torch.equal(out, want)


@pytest.mark.parametrize("threads", [1, 3])
def test_two_engines_of_one_pool_in_one_thread(core: Core, layer: PackedExperts, threads: int) -> None:
    """Submissions overlap and are waited for in either order: nothing deadlocks, nothing mixes."""
    shared = WorkerPool(core, threads)
    kernels = [kernel(shared) for _ in range(3)]
    cases = [case(seed) for seed in range(3)]
    wants = expected(core, layer, cases)
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        outs = [torch.empty_like(c[0]) for c in cases]
        for k, c, out in zip(kernels, cases, outs, strict=True):
            k.submit(layer, *c, out)
        for i in order:
            kernels[i].wait()
        assert all(torch.equal(out, want) for out, want in zip(outs, wants, strict=True))


@pytest.mark.parametrize("shared", [True, False])
def test_two_engines_in_two_threads(core: Core, layer: PackedExperts, shared: bool) -> None:
    pools = [WorkerPool(core, 2, hot_us=50)] * 4 if shared else [WorkerPool(core, 2, hot_us=50) for _ in range(4)]
    cases = [case(seed) for seed in range(4)]
    wants = expected(core, layer, cases)
    failures: list[str] = []

    def engine(i: int) -> None:
        k, out = kernel(pools[i]), torch.empty_like(cases[i][0])
        for _ in range(150):
            k.run(layer, *cases[i], out)
            if not torch.equal(out, wants[i]):
                failures.append(f"engine {i}")

    threads = [threading.Thread(target=engine, args=(i,), daemon=True) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=60)
    assert not failures and not any(t.is_alive() for t in threads)


def test_fork_leaves_a_working_pool_on_both_sides(core: Core, layer: PackedExperts) -> None:
    """The child has no helper threads of the parent's; its pool starts its own."""
    forked, (hidden, ids, weights) = WorkerPool(core, 3), case(0)
    k, out = kernel(forked), torch.empty(2, 256)
    k.run(layer, hidden, ids, weights, out)
    want = out.clone()
    child = os.fork()
    if child == 0:  # no pytest machinery here: compute, compare, leave
        signal.alarm(20)
        for _ in range(20):
            k.run(layer, hidden, ids, weights, out)
        os._exit(0 if torch.equal(out, want) else 1)
    for _ in range(20):
        k.run(layer, hidden, ids, weights, out)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(out, want)


def test_exit_with_hot_workers_is_clean() -> None:
    """A process ends at once, with code 0, whatever pools and submissions it leaves behind."""
    code = """
        import numpy as np, torch
        from tests.native.support import random_experts, random_routing
        from turbomoe.native.kernels import ExpertsKernel, open_pool
        pools = [open_pool(4, hot_us=10_000_000) for _ in range(2)]
        rng = np.random.default_rng(0)
        layer = random_experts(rng, 4, 64, 64, dict.fromkeys(("gate", "up", "down"), "Q8_0"), pool=pools[0])
        kernels = [ExpertsKernel(p, hidden=64, width=64, experts=4, top=2, rows=1) for p in pools]
        out = torch.empty(1, 64)
        for kernel in kernels:
            kernel.run(layer, torch.ones(1, 64), *random_routing(rng, 4, 1, 2), out)
        kernels[0].submit(layer, torch.ones(1, 64), *random_routing(rng, 4, 1, 2), out)
    """
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=root, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_closing_a_pool_stops_its_threads(core: Core) -> None:
    before = len(os.listdir("/proc/self/task"))
    extra = WorkerPool(core, 5)
    assert len(os.listdir("/proc/self/task")) == before + 4
    extra.close()
    assert len(os.listdir("/proc/self/task")) == before


def test_workers_sleep_when_there_is_nothing_to_do(core: Core) -> None:
    """After the hot time helpers sit in a futex: their state is S, not R, in every one of many looks."""
    before = set(os.listdir("/proc/self/task"))
    quiet = WorkerPool(core, 3, hot_us=1000)
    tasks = set(os.listdir("/proc/self/task")) - before
    assert len(tasks) == 2
    threading.Event().wait(0.3)
    states = {
        Path(f"/proc/self/task/{t}/stat").read_text().rsplit(")", 1)[1].split()[0] for t in tasks for _ in range(20)
    }
    quiet.close()
    assert states == {"S"}


def test_linear_and_experts_share_a_pool(core: Core, pool: WorkerPool, layer: PackedExperts) -> None:
    matrix = random_matrix(np.random.default_rng(1), "Q8_0", 300, 256, pool)
    linear, experts = LinearKernel(pool, cols=256, tokens=2), kernel(pool)
    c = case(5)
    (want,) = expected(core, layer, [c])
    linear_out = torch.empty(2, 300)
    linear.run([matrix], c[0], [linear_out])
    first = linear_out.clone()
    for _ in range(50):
        out = torch.empty(2, 256)
        experts.submit(layer, *c, out)
        linear.run([matrix], c[0], [linear_out])
        experts.wait()
        assert torch.equal(out, want) and torch.equal(linear_out, first)


@pytest.mark.parametrize("threads", [-1, 5000])
def test_impossible_pools(core: Core, threads: int) -> None:
    with pytest.raises(NativeError, match="could not be made"):
        WorkerPool(core, threads)


@pytest.mark.parametrize(
    ("affinity", "quota", "cores", "threads"),
    [
        (16, float("inf"), 16, 15),
        (16, 4.0, 4, 3),
        (2, float("inf"), 2, 2),
        (1, 8.0, 1, 1),
        (8, 0.5, 1, 1),
        (8, 2.9, 2, 2),
    ],
)
def test_threads_respect_affinity_and_quota(
    monkeypatch: pytest.MonkeyPatch, affinity: int, quota: float, cores: int, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)))
    monkeypatch.setattr(pool_module, "_quota_cores", lambda: quota)
    assert pool_module.usable_cores() == cores
    assert pool_module.default_threads() == threads
