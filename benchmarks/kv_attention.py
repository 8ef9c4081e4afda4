"""Decode attention over the KV cache on this GPU, beside bf16 scaled_dot_product_attention, inside CUDA graphs.

    python benchmarks/kv_attention.py [--lengths 4096 32768 131072 262144] [--types tq2 tcq2 ...]

First the ceiling: bytes that a step has to read and the copy bandwidth measured in this run. Arms are interleaved; the
same arm timed twice is printed beside them. Caches lie in several copies, more than the L2 cache holds, and hold random
codes (any bits are a valid code) and random windows of 64 and 256 tokens, which count as part of the length. A step is
the whole attention of one new token in one layer: rotating the query, codes, windows, turning back, storing the token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent.parent))

from turbomoe.config import KVSettings  # noqa: E402
from turbomoe.kv.cache import KVCache  # noqa: E402
from turbomoe.kv.kernels import launch  # noqa: E402
from turbomoe.kv.layer import Step  # noqa: E402
from turbomoe.kv.shape import AttentionShape  # noqa: E402

SHAPES = {"Qwen3.5-397B": (32, 2, 256), "Qwen3-30B": (32, 4, 128), "8 heads of 128": (32, 8, 128)}
TYPES = ["tq2", "tq3", "tq4", "tcq2", "tcq2.5", "tcq3", "tcq4", "q8_0", "bf16"]
COPIED = 256 << 20  # bytes that all copies of an arm's cache take at least: more than L2


@dataclass
class Arm:
    """One captured graph of ``calls`` attentions."""

    name: str
    graph: torch.cuda.CUDAGraph
    calls: int
    nbytes: int
    keep: object

    def microseconds(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return 1000 * start.elapsed_time(end) / self.calls


def capture(name: str, calls: list, nbytes: int, keep: object) -> Arm:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return Arm(name, graph, len(calls), nbytes, keep)


def copies(nbytes: int) -> int:
    return max(2, min(128, -(-COPIED // nbytes)))


def ours(shape: tuple[int, int, int], length: int, kind: str) -> Arm:
    heads, kv_heads, dim = shape
    settings = KVSettings(kind, kind)
    one = KVCache([AttentionShape(0, *shape)], settings, slots=1, ctx_size=length + 1, dtype=torch.bfloat16, device="meta")
    count = copies(one.nbytes())
    layers = [AttentionShape(i, *shape) for i in range(count)]
    cache = KVCache(layers, settings, slots=1, ctx_size=length + 1, dtype=torch.bfloat16, device="cuda")
    cache.reserve(0, length + 1)
    cache.lengths[0] = length
    for side in (side for pair in cache.attention.values() for side in pair):
        for stored in (side.sinks, side.ring, *side.planes):
            if stored.shape[-1] == 1:  # scales
                stored.uniform_(0.5, 1.5)
            elif stored.is_floating_point():
                stored.normal_()
            else:
                stored.view(torch.uint8).random_(0, 256)
    index = torch.zeros(1, dtype=torch.int64, device="cuda")
    step = Step(index, cache.lengths[index], cache.pages.table[index], 1, length, length + 1)
    query = torch.randn(1, heads, 1, dim, device="cuda", dtype=torch.bfloat16)
    key, value = torch.randn(2, 1, kv_heads, 1, dim, device="cuda", dtype=torch.bfloat16)
    calls = [lambda pair=pair: launch.attend_one(query, key, value, *pair, step, dim**-0.5) for pair in cache.attention.values()]
    return capture(kind, calls, one.nbytes(), (cache, step, query, key, value))


def sdpa(shape: tuple[int, int, int], length: int) -> list[Arm]:
    """bf16 attention by PyTorch: every backend and way of grouping the queries that runs here."""
    heads, kv_heads, dim = shape
    nbytes = 2 * 2 * kv_heads * dim * length
    stored = [torch.randn(2, 1, kv_heads, length, dim, device="cuda", dtype=torch.bfloat16) for _ in range(copies(nbytes))]
    query = torch.randn(1, heads, 1, dim, device="cuda", dtype=torch.bfloat16)
    grouped = query.view(1, kv_heads, heads // kv_heads, dim)
    arms = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        for way, q in (("gqa", query), ("grouped", grouped)):
            def call(kv, q=q, backend=backend, way=way):
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(q, kv[0], kv[1], enable_gqa=way == "gqa" and heads != kv_heads)
            try:
                name = f"sdpa {backend.name.split('_')[0].lower()} {way}"
                arms.append(capture(name, [lambda kv=kv, call=call: call(kv) for kv in stored], nbytes, (stored, query)))
            except Exception as error:  # a backend that this build lacks or that refuses the shape
                torch.cuda.synchronize()
                print(f"    no {name}: {str(error).splitlines()[0][:80]}")
    return arms


def timed(arms: list[Arm], rounds: int = 9) -> dict[str, float]:
    """Median microseconds an attention, the arms taking turns; the first arm runs twice a round (A/A)."""
    found: dict[str, list[float]] = {arm.name: [] for arm in arms} | {"again": []}
    for arm in arms:
        arm.microseconds()
    for _ in range(rounds):
        for arm in arms:
            found[arm.name].append(arm.microseconds())
        found["again"].append(arms[0].microseconds())
    return {name: statistics.median(times) for name, times in found.items()}


def bandwidth() -> float:
    """Bytes a second of a large copy, read and written."""
    a, b = torch.randint(0, 99, (2, 1 << 28), dtype=torch.int32, device="cuda")
    best = 1e9
    for _ in range(8):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        b.copy_(a)
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1000)
    return 2 * a.nbytes / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 32768, 131072, 262144])
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    args = parser.parse_args()
    import triton

    warnings.filterwarnings("ignore", message=".*attention|.*kernel|For dense input")
    rate, rows = bandwidth(), []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; copy {rate / 1e12:.2f} TB/s")
    for name in args.shapes:
        for length in args.lengths:
            base = sdpa(SHAPES[name], length)
            times = timed(base)
            best = min(base, key=lambda arm: times[arm.name])
            del base
            print(f"{name}, {length} tokens; bf16 {best.name}: {times[best.name]:.1f} us; again {times['again']:.1f}", flush=True)
            for kind in args.types:
                arm = ours(SHAPES[name], length, kind)
                t = timed([best, arm])
                floor = arm.nbytes / rate * 1e6
                row = {"shape": name, "tokens": length, "type": kind, "mib": arm.nbytes / 2**20, "floor_us": floor,
                       "us": t[kind], "bf16_us": t[best.name], "bf16_again_us": t["again"], "faster": t[best.name] / t[kind]}  # fmt: skip
                rows.append(row)
                print(f"  {kind:7} {row['mib']:8.2f} MiB  ceiling {floor:7.1f} us  {t[kind]:7.1f} us ({100 * floor / t[kind]:3.0f}%)"
                      f"  bf16 {t[best.name]:7.1f} us  {row['faster']:5.2f} x", flush=True)  # fmt: skip
                del arm
            del best
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
                      "copy_tb_s": rate / 1e12, "rows": rows}))  # fmt: skip


if __name__ == "__main__":
    main()
