"""Prefill attention over the KV cache on this GPU: its contract, then its time beside bf16 attention by PyTorch.

    python benchmarks/kv_prefill.py

First a matrix of random caches: a kernel's error against a float64 oracle may be at most twice that of plain PyTorch in
the model's precision; BAD stands before a line where it is more. The matrix runs in several processes, whose time goes
into compiling. Then times of a chunk of new tokens in one layer of the 397B shape, without encoding and storing it:
"slab" decodes pages once for all programs, "registers" in each program (which a chunk gets that has few of them).
Beside it bf16 attention over a past of as many tokens: flash attention with the causal mask at the bottom
right, and cuDNN without a mask, which has a little more to do. Their share is of the rate of a large bf16 product,
measured in this run. Arms take turns; PyTorch's best is timed twice (A/A).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_stamp import stamp

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.kv.prefill_contract import Chunk, errors
from turbomoe.config import KVSettings
from turbomoe.kv.attention import query_block
from turbomoe.kv.cache import KVCache
from turbomoe.kv.kernels import prefill_launch
from turbomoe.kv.means import KVMeans
from turbomoe.kv.shape import AttentionShape

SHAPE = HEADS, KV_HEADS, DIM = 32, 2, 256
PAIRS = 32  # channels that turn with as many others
TYPES = ("tq2", "tcq2", "tcq3", "q8_0")
PASTS, COUNTS = (4096, 32768, 131072), (512, 2048)
NEVER, ALWAYS = 1 << 30, 1  # values of SLAB_BLOCKS
PROCESSES = 14
LONGEST = 240  # seconds of the matrix: most of it compiles, one of them for 40 s or more
HALF = torch.float16


def flagship(kind: str) -> Chunk:
    """The shape that is timed, in more pages than one slab has."""
    return Chunk(DIM, HEADS, KV_HEADS, kind, kind, (20_000,), 64, 256, turning_pairs=PAIRS, count=128, looked_at=3)


def cases() -> list[tuple[Chunk, int]]:
    """Chunks with SLAB_BLOCKS, in the order in which processes take turns with them."""
    found = [(flagship(kind), slab) for slab in (ALWAYS, NEVER) for kind in TYPES]
    small = [
        Chunk(128, 16, 2, kind, kind, (1000, 41), count=70) for kind in ("tq3", "tq4", "tcq2.5", "tcq4", "bf16", "f16")
    ]
    small += [
        Chunk(64, heads, 2, "tq3", "tcq3", (300, 0), count=150, dtype=HALF, turning_pairs=t)
        for heads, t in ((6, 32), (2, 0))
    ]
    small += [
        Chunk(256, 8, 2, k, v, (700,), count=100, means=False)
        for k, v in (("bf16", "tcq3"), ("tq4", "bf16"), ("q8_0", "tq2"), ("tq4", "tcq4"))
    ]
    small += [Chunk(256, 8, 2, "bf16", "bf16", (700, 64), count=100, dtype=HALF, means=False)]
    found += [(chunk, ALWAYS) for chunk in small]
    found += [(chunk, NEVER) for chunk in small if "bf16" not in (chunk.type_k, chunk.type_v)]
    found += [
        (Chunk(256, 32, 2, "tcq2", "tq2", (9000,), count=3), NEVER),
        (Chunk(64, 16, 1, "f16", "f16", (4097,), count=9), NEVER),
    ]
    return found


def check(numbers: list[int]) -> None:
    """Run these cases, a line each. After an error, which a CUDA context does not survive, go on in a new process."""
    every = cases()
    for i, number in enumerate(numbers):
        chunk, slab = every[number]
        prefill_launch.SLAB_BLOCKS = slab
        name = f"{number:2} D {chunk.head_dim} heads {chunk.heads}/{chunk.kv_heads} {chunk.type_k}/{chunk.type_v}"
        name += f" {chunk.lengths}+{chunk.count} {str(chunk.dtype)[6:]}{' means' if chunk.means else ''}"
        name += " slab" if slab == ALWAYS else " registers"
        started = time.time()
        try:
            ours, plain = errors(chunk, prefill_launch.attend_block, "cuda")
        except Exception as error:
            print(f"BAD {name}: {type(error).__name__} {str(error)[:300]!r}", flush=True)
            if numbers[i + 1 :]:
                os.execv(sys.executable, [sys.executable, __file__, "--cases", *map(str, numbers[i + 1 :])])
            return
        verdict = "ok " if ours <= 2 * plain else "BAD"
        print(
            f"{verdict} {name}: {ours:.1e}, {ours / plain:.2f} x PyTorch's, {time.time() - started:.1f} s", flush=True
        )


def matrix() -> tuple[int, int]:
    """(cases, those that are not fine)."""
    total = len(cases())
    shares = [[str(n) for n in range(i, total, PROCESSES)] for i in range(min(PROCESSES, total))]
    command, environment = [sys.executable, __file__, "--cases"], os.environ | {"OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [*command, *share], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        for share in shares
    ]
    fine, deadline = 0, time.time() + LONGEST
    for process in running:
        try:
            output, _ = process.communicate(timeout=max(1.0, deadline - time.time()))
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            print("BAD a process did not end in time", flush=True)
        lines = output.splitlines()
        fine += sum(line.startswith("ok ") for line in lines)
        print("\n".join(line for line in lines if line[:3] in ("ok ", "BAD")) or f"BAD {output[-600:]}", flush=True)
    return total, total - fine


@dataclass(frozen=True)
class Layer:
    """One layer's cache with a past and a chunk to attend with."""

    cache: KVCache
    count: int
    query: torch.Tensor
    exact: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def random(cls, kind: str, past: int, count: int) -> Layer:
        """Random codes, scales and windows, made on the GPU."""
        means = [torch.randn(KV_HEADS, DIM) for _ in range(2)]
        table = KVMeans({0: means[0]}, {0: means[1]}, "x", {0: torch.ones(KV_HEADS, DIM)}, 0.8 ** torch.arange(PAIRS))
        cache = KVCache([AttentionShape(0, *SHAPE)], KVSettings(kind, kind), slots=1, ctx_size=past + count,
                        dtype=torch.bfloat16, device="cuda", means=table)  # fmt: skip
        for side in cache.attention[0]:
            for stored in (side.sinks, side.ring, *side.planes):
                if stored.shape[-1] in (1, 8):  # scales
                    stored.uniform_(0.5, 1.5).div_(1 if stored.shape[-1] == 1 else 64)
                elif stored.is_floating_point():
                    stored.normal_()
                else:
                    stored.view(torch.uint8).random_(0, 256)
        cache.reserve(0, past)
        cache.host_lengths[0] = past
        cache.lengths[0] = past
        cache.begin([0], count)
        made = torch.randn(2, 1, KV_HEADS, cache.recent + count, DIM, device="cuda", dtype=torch.bfloat16)
        return cls(
            cache, count, torch.randn(1, HEADS, count, DIM, device="cuda", dtype=torch.bfloat16), (made[0], made[1])
        )

    def attend(self) -> None:
        """As ``attention.attend`` does, block by block."""
        size = query_block("cuda")
        for i in range(0, self.count, size):
            block = self.query[:, :, i : i + size]
            prefill_launch.attend_block(block, i, *self.exact, *self.cache.attention[0], self.cache.step, DIM**-0.5)


def pytorch(past: int, count: int) -> dict:
    """bf16 attention over as many tokens, by name."""
    query = torch.randn(1, HEADS, count, DIM, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, KV_HEADS, past + count, DIM, device="cuda", dtype=torch.bfloat16)

    def flash() -> None:
        # Called by its own name flash attention takes "causal" as aligned at the bottom right.
        torch.ops.aten._scaled_dot_product_flash_attention(query, k, v, 0.0, True)

    def cudnn() -> None:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            torch.nn.functional.scaled_dot_product_attention(query, k, v, enable_gqa=True)

    found = {}
    for name, call in (("flash", flash), ("cudnn, no mask", cudnn)):
        try:
            call()
            torch.cuda.synchronize()
            found[name] = call
        except Exception as error:  # a backend that this build lacks or that refuses the shape
            print(f"    no {name}: {str(error).splitlines()[0][:120]}")
    if not found:
        found["default"] = lambda: torch.nn.functional.scaled_dot_product_attention(query, k, v, enable_gqa=True)
    return found


def milliseconds(call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def timed(arms: dict, rounds: int = 5) -> dict[str, float]:
    """Median milliseconds, the arms taking turns after one call each that is not counted."""
    for call in arms.values():
        call()
    times = [{name: milliseconds(call) for name, call in arms.items()} for _ in range(rounds)]
    return {name: statistics.median(time[name] for time in times) for name in arms}


def peak_mib(call) -> float:
    """Memory that a call takes beside what is there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def product_rate() -> float:
    """TFLOP/s of a large bf16 product, the best of a few."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    a @ b
    return 2 * 8192**3 / min(milliseconds(lambda: a @ b) for _ in range(8)) / 1e9


def with_slab(slab: int, layer: Layer):
    def call() -> None:
        prefill_launch.SLAB_BLOCKS = slab
        layer.attend()

    return call


def times(rate: float, rows: list[dict]) -> None:
    """Fill ``rows``, a line each."""
    for count, past in itertools.product(COUNTS, PASTS):
        base = pytorch(past, count)
        work = 4 * HEADS * DIM * count * (past + count / 2) / 1e9  # GFLOP, and by the millisecond TFLOP/s
        alone = timed(base)
        print(
            f"{count} tokens after {past}:",
            *(f"{name} {ms:.2f} ms ({work / ms / rate:.0%})" for name, ms in alone.items()),
        )
        best = min(alone, key=lambda name: alone[name])
        for kind in TYPES:
            layer = Layer.random(kind, past, count)
            arms = {best: base[best], f"{best} again": base[best], "slab": with_slab(ALWAYS, layer)}
            if count == 512:
                arms["registers"] = with_slab(NEVER, layer)
            t = timed(arms)
            row = {"type": kind, "past": past, "count": count, "bf16": best, "ms": t, "share": work / t["slab"] / rate,
                   "mib": peak_mib(arms["slab"]), "cache_mib": layer.cache.nbytes() / 2**20}  # fmt: skip
            rows.append(row)
            print(f"  {kind:5} " + ", ".join(f"{name} {ms:.2f}" for name, ms in t.items())
                  + f" ms; slab {row['share']:.0%} of the product's rate, {t[best] / t['slab']:.2f} x bf16's speed,"
                  f" {row['mib']:.0f} MiB beside a cache of {row['cache_mib']:.0f}", flush=True)  # fmt: skip


def shapes_of_programs() -> list[dict]:
    """The slab's time in programs of other sizes: (rows, warps, stages)."""
    layer, found = Layer.random("tq2", 32768, 512), []
    chosen = prefill_launch._program
    for shape in ((128, 8, 2), (64, 4, 1), (64, 4, 2), (128, 8, 3)):
        prefill_launch._program = lambda device, shape=shape: shape
        try:
            found.append({"rows, warps, stages": shape, "ms": timed({"slab": with_slab(ALWAYS, layer)})["slab"]})
            print(f"  tq2, 512 after 32768, rows, warps and stages {shape}: {found[-1]['ms']:.2f} ms", flush=True)
        except Exception as error:
            print(f"  rows, warps and stages {shape}: {str(error)[:120]!r}", flush=True)
    prefill_launch._program = chosen
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, nargs="+", help="check these cases only, in this process")
    numbers = parser.parse_args().cases
    if numbers:
        check(numbers)
        return
    started, where, rows, shapes, failed = time.time(), stamp(), [], [], ""
    total, bad = matrix()
    print(f"{total} cases, {bad} BAD, {time.time() - started:.0f} s", flush=True)
    try:
        rate = product_rate()
        print(f"{where['device']}, torch {where['torch']}, triton {where['triton']}")
        print(f"bf16 product {rate:.0f} TFLOP/s: the ceiling")
        times(rate, rows)
        shapes = shapes_of_programs()
    except Exception as error:
        failed = f"{type(error).__name__} {str(error)[:500]}"
        print(f"BAD times stopped: {failed}", flush=True)
    print(f"{time.time() - started:.0f} s")
    print(json.dumps({**where,
                      "cases": total, "bad": bad, "failed": failed, "rows": rows, "programs": shapes}))  # fmt: skip


if __name__ == "__main__":
    main()
