"""What it costs to encode keys and values by trellis on this GPU; run by ``kv_encode.py --cuda``.

First the kernels are compiled, all at once; then each is held against its reference in PyTorch, a line a case; then
times: microseconds a vector of the whole encoding and of the search, beside the least that the instructions of the
search take; and the share of a prefill: all keys and values of 32,768 tokens against the work of the attention layers
on them, projections and causal attention in bf16, both measured here.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_stamp import stamp
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent.parent))

from turbomoe.kv.codecs import make_codec
from turbomoe.kv.codecs.scales import matched_scale, spread_out
from turbomoe.kv.codecs.windows import pack_steps, to_planes
from turbomoe.kv.kernels import encode_input, encoding
from turbomoe.kv.trellis_codebook import GAUSSIAN_NMSE, TRELLISES, codebook
from turbomoe.kv.trellis_fixed import search_fixed
from turbomoe.kv.trellis_search import HALF_SPAN

TOKENS = 32_768


@dataclass(frozen=True)
class Shape:
    """A model's attention layers; ``query_width`` counts what the query projection makes, gates included."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    dim: int
    query_width: int


SHAPES = (
    Shape("397B shape", 15, 4096, 32, 2, 256, 2 * 32 * 256),
    Shape("dense 8B shape", 32, 4096, 32, 8, 128, 32 * 128),
)


def compile_all() -> None:
    """Each kernel in a process of its own: the compiler takes one core each."""
    jobs = [subprocess.Popen([sys.executable, __file__, "--compile", name]) for name in TRELLISES]
    for name, job in zip(TRELLISES, jobs, strict=True):
        if job.wait():
            print(f"BAD {name} does not compile or run")


def milliseconds(run: Callable[[], object], rounds: int = 5) -> float:
    """Median of a call, after one that does not count."""
    run()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def expected(x: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of the reference in the GPU's arithmetic."""
    trellis = TRELLISES[name]
    spread, peak, norm = spread_out(x)
    windows = search_fixed(spread.nan_to_num(nan=0.0), trellis)
    symbols = windows & (1 << trellis.step_bits) - 1
    chosen = codebook(trellis, str(x.device)).t()[windows].flatten(1)
    codes = to_planes(pack_steps(symbols, trellis.step_bits), trellis)
    return codes, matched_scale(chosen, peak, norm)


def check(name: str, dim: int) -> bool:
    """Codes equal to the reference's, scales too but for the order of a sum, the error that of the table."""
    codec = make_codec(name, dim)
    x = torch.randn(4099, dim, device="cuda")
    x[5], x[6, 3], x[7], x[8, 1:] = 0, math.nan, 1e-30, 0
    codes, scales = codec.encode(x)
    want_codes, want_scales = expected(x, name)
    wrong = int((codes != want_codes).any(1).sum())
    # One step of a half at most.
    same_scales = torch.allclose(scales.float(), want_scales.float(), rtol=2**-10, atol=2**-24, equal_nan=True)
    decoded = codec.decode((codes[9:], scales[9:]))
    error = float((decoded - x[9:]).square().sum() / x[9:].square().sum())
    table = GAUSSIAN_NMSE[name][dim]
    # 4,090 vectors of 64 values scatter by 0.4%.
    good = wrong == 0 and same_scales and abs(error / table - 1) < 0.015
    print(f"{'ok ' if good else 'BAD'} {name:7} {dim:4} {wrong} of {len(x)} codes differ from the reference, scales "
          f"{'agree' if same_scales else 'DIFFER'}, error {error:.5f} (table {table:.5f})", flush=True)  # fmt: skip
    return good


def floor_us(name: str, dim: int) -> float:
    """A vector, if minima at 64 a clock and processor, each of two vectors, hide the rest."""
    trellis = TRELLISES[name]
    properties = torch.cuda.get_device_properties(0)
    clock_mhz = 1e-3 * getattr(properties, "clock_rate", 1_980_000)
    states = (dim // trellis.values + 2 * HALF_SPAN) * trellis.states
    return states / 2 / 64 / properties.multi_processor_count / clock_mhz


def time_codec(name: str, dim: int, vectors: int) -> dict[str, Any]:
    codec, trellis = make_codec(name, dim), TRELLISES[name]
    x = torch.randn(vectors, dim, device="cuda")
    columns = encode_input.columns(x, trellis)[0]
    whole = milliseconds(lambda: codec.encode(x))
    alone = milliseconds(lambda: encoding.search(columns, vectors, trellis))
    few = milliseconds(lambda: codec.encode(x[:64]))
    row = {"codec": name, "dim": dim, "vectors": vectors, "ms": whole, "search_ms": alone, "few_ms": few,
           "us": 1e3 * whole / vectors, "floor_us": floor_us(name, dim)}  # fmt: skip
    print(f"{name:7} {dim:4} {row['us']:8.4f} us a vector of {vectors} (search {1e3 * alone / vectors:.4f}, floor "
          f"{row['floor_us']:.4f}); 64 vectors {few:.2f} ms", flush=True)  # fmt: skip
    return row


def layer_ms(shape: Shape) -> tuple[float, float]:
    """Milliseconds of one layer's projections and of its causal attention over TOKENS tokens, by the best backend."""

    def new(*size: int) -> torch.Tensor:
        return torch.randn(size, device="cuda", dtype=torch.bfloat16)

    x, wide = new(TOKENS, shape.hidden), new(TOKENS, shape.heads * shape.dim)
    into = new(shape.hidden, shape.query_width + 2 * shape.kv_heads * shape.dim)
    out = new(shape.heads * shape.dim, shape.hidden)
    projections = milliseconds(lambda: (x @ into, wide @ out))
    q, k, v = (new(1, heads, TOKENS, shape.dim) for heads in (shape.heads, shape.kv_heads, shape.kv_heads))
    times = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            with sdpa_kernel(backend):
                times.append(milliseconds(
                    lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), 3))  # fmt: skip
        except RuntimeError as error:
            torch.cuda.synchronize()
            print(f"    no {backend.name}: {str(error).splitlines()[0][:80]}")
    return projections, min(times)


def shares(shape: Shape, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    projections, attention = layer_ms(shape)
    work, found = shape.layers * (projections + attention), []
    for row in (row for row in rows if row["dim"] == shape.dim):
        vectors = 2 * shape.layers * shape.kv_heads * TOKENS
        encode = vectors * row["ms"] / row["vectors"]
        found.append({"shape": shape.name, "codec": row["codec"], "encode_ms": encode, "work_ms": work,
                      "projections_ms": projections, "attention_ms": attention, "share": encode / work})  # fmt: skip
        print(f"32k-token prefill: {shape.name}, {row['codec']}: encode {encode:.1f} ms, attention-layer work "
              f"{work:.1f} ms ({projections:.1f} + {attention:.1f} a layer), share {100 * encode / work:.1f} %",
              flush=True)  # fmt: skip
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", choices=list(TRELLISES))
    args = parser.parse_args()
    if args.compile:
        make_codec(args.compile, 128).encode(torch.randn(64, 128, device="cuda"))
        torch.cuda.synchronize()
        return 0
    start = time.perf_counter()
    compile_all()
    compiled = time.perf_counter() - start
    print(f"compiled in {compiled:.1f} s", flush=True)
    checks = [check(name, dim) for name in TRELLISES for dim in (64, 128, 256)]
    # As many as a launch takes twice, all of a layer's keys of 32,768 tokens.
    rows = [time_codec(name, dim, 65_536) for name in TRELLISES for dim in (128, 256)]
    found = [row for shape in SHAPES for row in shares(shape, rows)]
    print(json.dumps({**stamp(), "compile_s": compiled,
                      "correct": all(checks), "rows": rows, "shares": found}))  # fmt: skip
    return 0 if all(checks) else 1


if __name__ == "__main__":
    sys.exit(main())
