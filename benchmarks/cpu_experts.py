"""Routed experts on the CPU: this core at every dispatch level against the read bandwidth, ggml and PyTorch's int4.

    python benchmarks/cpu_experts.py [--threads 1,2] [--rows 1,4,32,512] [--shapes 397b,35b] [--formats Q4_K,Q4_0]

Needs a C compiler; ggml joins where ``ggml-python`` is installed. Arms are interleaved call by call, so that a noisy
machine hits all of them; each round also reads memory at full speed, and shares are of that round's rate. The first
arm runs twice (A/A): differences between other arms that are no larger mean nothing. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from cpu_peers import GgmlLayer, TorchInt4Layer  # noqa: E402

from tests.native.support import random_raw  # noqa: E402
from turbomoe.native.build import ensure_built  # noqa: E402
from turbomoe.native.kernels import ExpertsKernel  # noqa: E402
from turbomoe.native.library import Core  # noqa: E402
from turbomoe.native.packed import MATRICES, PackedExperts, aligned_bytes, expert_shape, pack_expert  # noqa: E402
from turbomoe.native.pool import WorkerPool, usable_cores  # noqa: E402
from turbomoe.native.repack import pack, unpack  # noqa: E402


@dataclass(frozen=True)
class Shape:
    """Expert shape of a model: hidden and expert width, experts per token."""

    hidden: int
    width: int
    top: int


SHAPES = {"397b": Shape(4096, 1024, 10), "35b": Shape(2048, 512, 8)}


def last_level_cache() -> int:
    """Bytes of the largest cache that the first core sees; 32 MiB if the system does not say."""
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(s[:-1]) << {"K": 10, "M": 20}[s[-1]] for s in sizes), default=32 << 20)


class Layer:
    """One layer's experts, each at an address of its own, far more of them than caches hold."""

    def __init__(self, shape: Shape, format: str, pool: WorkerPool) -> None:
        self.shape, self.format = shape, format
        self.formats = dict.fromkeys(MATRICES, format)
        self.plan = expert_shape(shape.hidden, shape.width, self.formats)
        self.count = max(8 * shape.top, -(-max(400 << 20, 4 * last_level_cache()) // self.plan.nbytes))
        rng = np.random.default_rng(0)
        self.raw = {n: random_raw(rng, format, p.rows, p.cols) for n, p in self.plan.layouts.items()}
        arena = aligned_bytes(self.plan.nbytes * self.count).view(self.count, -1)
        pack_expert(self.plan, self.raw, arena[0], pool)
        arena[1:] = arena[0]
        self.packed = PackedExperts(self.plan, list(arena))

    def float_weights(self) -> dict[str, torch.Tensor]:
        plans = self.plan.layouts.items()
        return {
            n: unpack(pack(self.raw[n], self.format, p.rows, p.cols), self.format, p.rows, p.cols) for n, p in plans
        }


@dataclass
class Work:
    """What every arm computes in one call."""

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


def works(layer: Layer, rows: int, rng: np.random.Generator) -> Iterator[Work]:
    """Endless calls. Few rows take experts in turn from a shuffled deck, so that no cache holds what comes next."""
    shape, deck = layer.shape, np.empty(0, dtype=np.int64)
    while True:
        if rows <= 4:
            if len(deck) < rows * shape.top:
                deck = rng.permutation(layer.count)
            ids, deck = deck[: rows * shape.top].reshape(rows, -1), deck[rows * shape.top :]
        else:
            ids = np.stack([rng.permutation(layer.count)[: shape.top] for _ in range(rows)])
        weights = torch.full((rows, shape.top), 1 / shape.top)
        yield Work(torch.randn(rows, shape.hidden) * 0.1, torch.from_numpy(np.ascontiguousarray(ids)), weights)


class Arm(Protocol):
    """A way to compute a layer. ``run`` is what is timed; ``nbytes`` are the bytes of one of its experts."""

    nbytes: int

    def prepare(self, work: Work) -> None: ...
    def run(self) -> None: ...
    def close(self) -> None: ...


class Ours:
    """This core at one level."""

    def __init__(self, layer: Layer, pool: WorkerPool, rows: int, level: str) -> None:
        shape = layer.shape
        self.layer, self.core, self.level, self.nbytes = layer, pool.core, level, layer.plan.nbytes
        self.kernel = ExpertsKernel(
            pool, hidden=shape.hidden, width=shape.width, experts=layer.count, top=shape.top, rows=rows
        )
        self.out = torch.empty(rows, shape.hidden)

    def prepare(self, work: Work) -> None:
        self.core.force_level(self.level)
        many = len(work.ids) > 4  # as in prefill
        self.kernel.prepare(self.layer.packed, work.hidden, work.ids, work.weights, self.out, many=many)

    def run(self) -> None:
        self.core.experts_run(self.kernel.address)

    def close(self) -> None:
        self.core.force_level("auto")


class Peer:
    """A layer of ``cpu_peers`` as an arm."""

    def __init__(self, layer: GgmlLayer | TorchInt4Layer, nbytes: int, threads: int) -> None:
        self.layer, self.nbytes = layer, nbytes
        self.run, self.close = layer.run, layer.close
        layer.set_threads(threads)

    def prepare(self, work: Work) -> None:
        self.layer.prepare(work.hidden, work.ids, work.weights)


@dataclass
class Times:
    """Seconds a call and the share of the probe's rate, by round."""

    seconds: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    def summary(self, flops: float) -> dict[str, float]:
        median = float(np.median(self.seconds))
        return {
            "ms": round(median * 1e3, 4), "ms_best": round(min(self.seconds) * 1e3, 4), "calls": len(self.seconds),
            "gb_s": round(float(np.median(self.rates)) / 1e9, 2), "gb_s_best": round(max(self.rates) / 1e9, 2),
            "share": round(float(np.median(self.shares)), 3), "gflop_s": round(flops / median / 1e9, 1),
        }  # fmt: skip


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Probe:
    """Reads memory as fast as it goes, in pieces as large as one call reads: a noisy moment hits both alike."""

    def __init__(self, piece: int) -> None:
        self.piece = piece // 64 * 64
        self.count = -(-max(1 << 30, 4 * last_level_cache()) // self.piece)
        self.memory, self.next = aligned_bytes(self.piece * self.count), 0

    def rate(self, pool: WorkerPool) -> float:
        """Bytes a second of one piece, in turn."""
        at = self.memory.data_ptr() + self.next * self.piece
        self.next = (self.next + 1) % self.count
        return self.piece / timed(lambda: pool.core.read(pool.handle, at, self.piece))


def run_cell(
    layer: Layer, rows: int, arms: dict[str, Arm], probe: Callable[[], float], budget: float
) -> tuple[dict[str, Times], list[float]]:
    """Rounds of all arms in turn until the budget is spent, at least 5: times by arm, and the probe's rates."""
    stream, times, rates = works(layer, rows, np.random.default_rng(1)), {n: Times() for n in arms}, []
    calls = 8 if rows == 1 else 4 if rows <= 4 else 1
    end = time.perf_counter() + budget
    while len(rates) < 5 or time.perf_counter() < end:
        rates.append(float(np.median([probe() for _ in range(4)])))
        for name, arm in arms.items():
            for _ in range(calls):
                work = next(stream)
                arm.prepare(work)
                seconds = timed(arm.run)
                rate = len(work.ids.unique()) * arm.nbytes / seconds
                times[name].seconds.append(seconds)
                times[name].rates.append(rate)
                times[name].shares.append(rate / rates[-1])
    return times, rates


def make_arms(layer: Layer, pool: WorkerPool, rows: int, peers: dict[str, object]) -> dict[str, Arm]:
    """Our levels, the best one twice, and the peers that are there."""
    shape, levels = layer.shape, pool.core.levels()
    arms: dict[str, Arm] = {f"ours {levels[0]}": Ours(layer, pool, rows, levels[0])}
    arms["ours again"] = Ours(layer, pool, rows, levels[0])
    for level in levels[1:]:
        if level != "portable" or rows <= 32:
            arms[f"ours {level}"] = Ours(layer, pool, rows, level)
    if "ggml" in peers:
        ggml = GgmlLayer(layer.raw, layer.formats, shape.hidden, shape.width, layer.count, shape.top, rows)
        arms["ggml"] = Peer(ggml, sum(r.numel() for r in layer.raw.values()), pool.threads)
    if "torch" in peers:
        torch_layer = peers["torch"]
        assert isinstance(torch_layer, TorchInt4Layer)
        arms["torch int4"] = Peer(torch_layer, torch_layer.nbytes, pool.threads)
    return arms


def empty_call_us(layer: Layer, pool: WorkerPool) -> float:
    """Microseconds of a call whose experts are all left out: the cost of asking."""
    arm = Ours(layer, pool, 1, pool.core.levels()[0])
    ids = torch.full((1, layer.shape.top), -1)
    arm.prepare(Work(torch.zeros(1, layer.shape.hidden), ids, torch.zeros(1, layer.shape.top)))
    return float(np.median([timed(arm.run) for _ in range(2000)])) * 1e6


def print_cell(cell: dict[str, object], results: dict[str, dict[str, float]]) -> None:
    print(
        f"\n{cell['shape']} {cell['format']}, {cell['rows']} rows, {cell['threads']} threads: "
        f"probe {cell['probe_gb_s']} GB/s; empty call {cell['empty_call_us']} us"
    )
    first = next(iter(results.values()))
    for name, r in results.items():
        ratio = r["ms"] / first["ms"]
        print(
            f"  {name:14s} {r['ms']:9.3f} ms (best {r['ms_best']:.3f})  {r['gb_s']:7.2f} GB/s  "
            f"{r['share']:6.3f} of the probe  {r['gflop_s']:7.1f} GFLOP/s  {ratio:5.2f} x the first"
        )


def find_peers(layer: Layer, wanted: str) -> dict[str, object]:
    peers: dict[str, object] = {}
    if "ggml" in wanted:
        try:
            import ggml

            peers["ggml"] = ggml
        except ImportError:
            print("ggml is left out: ggml-python is not installed")
    if "torch" in wanted:
        peers["torch"] = TorchInt4Layer(layer.float_weights(), layer.count)
    return peers


def run_layer(layer: Layer, name: str, core: Core, args: argparse.Namespace) -> list[dict[str, object]]:
    cells, peers = [], find_peers(layer, args.peers)
    probe = Probe(layer.plan.nbytes * layer.shape.top)
    for threads in args.threads:
        pool = WorkerPool(core, threads)
        empty = empty_call_us(layer, pool)
        for rows in args.rows:
            arms = make_arms(layer, pool, rows, peers)
            times, rates = run_cell(layer, rows, arms, partial(probe.rate, pool), args.seconds)
            flops = 6.0 * rows * layer.shape.top * layer.shape.hidden * layer.shape.width
            results = {arm: t.summary(flops) for arm, t in times.items()}
            cell: dict[str, object] = {
                "shape": name, "format": layer.format, "rows": rows, "threads": threads, "experts": layer.count,
                "probe_gb_s": round(float(np.median(rates)) / 1e9, 2), "empty_call_us": round(empty, 2),
            }  # fmt: skip
            print_cell(cell, results)
            cells.append(cell | {"arms": results})
            for arm in arms.values():
                arm.close()
        pool.close()
    return cells


def numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def main() -> None:
    cores = usable_cores()
    threads = "1,2" if cores <= 2 else f"4,8,{cores - 1}" if cores >= 16 else f"1,{cores - 1}"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=numbers, default=numbers(threads))
    parser.add_argument("--rows", type=numbers, default=[1, 4, 32, 512])
    parser.add_argument("--shapes", default="397b,35b")
    parser.add_argument("--formats", default="Q4_K,Q4_0")
    parser.add_argument("--peers", default="ggml,torch", help="which of ggml and torch to run beside our own")
    parser.add_argument("--seconds", type=float, default=6.0, help="time for each cell of the table")
    args = parser.parse_args()
    core = Core(ensure_built())
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    machine = {"cpu": model, "cores": cores, "last_level_cache": last_level_cache(), "levels": core.levels(),
               "load": os.getloadavg()[0]}  # fmt: skip
    print(f"{model}, {cores} cores, load {machine['load']:.1f}; levels {', '.join(core.levels())}")
    cells = []
    for name in args.shapes.split(","):
        for format in args.formats.split(","):
            pool = WorkerPool(core)
            layer = Layer(SHAPES[name], format, pool)
            pool.close()
            call = layer.plan.nbytes * layer.shape.top
            print(f"\n{name} {format}: {layer.count} experts of {layer.plan.nbytes} bytes, {call / 1e6:.1f} MB a row")
            cells += run_layer(layer, name, core, args)
            del layer
            gc.collect()
    print(json.dumps({"benchmark": "cpu_experts", "machine": machine, "cells": cells}))


if __name__ == "__main__":
    main()
