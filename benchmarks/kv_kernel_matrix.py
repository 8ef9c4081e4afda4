"""Every KV kernel of decoding against its contract, on this GPU: the full matrix of which ``make test`` runs a part.

    python benchmarks/kv_kernel_matrix.py

First that the assembly's values are those of the tables, for every window of the trellis codes. Then, for each head
size and pair of types, attention over six sequences of 0 to 4,097 tokens: the error relative to a float64 oracle
beside
that of plain PyTorch in the same precision. Ratios of query to KV heads take turns from 1 to 16. Last line: JSON.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton
import triton.language as tl
from gpu_stamp import stamp

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.kv.contract import Case, errors
from turbomoe.kv.codecs import make_codec
from turbomoe.kv.kernels.codes import row_order, vectors
from turbomoe.kv.kernels.launch import attend_one
from turbomoe.kv.kernels.layout import SCALAR_BITS, byte_offset, byte_unit, chunks, column_dims, in_bytes, table
from turbomoe.kv.trellis_codebook import TRELLISES

TYPES = ("f16", "bf16", "q8_0", "tq2", "tq3", "tq4", "tcq2", "tcq2.5", "tcq3", "tcq4")
MIXED = [("tcq3", "tcq2"), ("tcq2.5", "tcq2"), ("q8_0", "tq3"), ("bf16", "tcq3"), ("tq4", "bf16"), ("tcq4", "f16")]
PAIRS = [*((t, t) for t in TYPES), *MIXED]
WINDOWS = ((8, 31), (64, 256), (8, 0), (64, 256), (0, 0))
SIZES, RATIOS, LENGTHS = (64, 128, 256), (1, 3, 8, 16), (0, 1, 40, 105, 1000, 4097)
SIGMAS = {"tq2": 5e-4, "tq3": 1e-3, "tq4": 1e-3}  # a level's error in half precision; trellis values are exact


@triton.jit
def _dump(codes, out, dims_at, table, D: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, FOR_SCORES: tl.constexpr, ASM: tl.constexpr):  # noqa: E501  # fmt: skip
    n, dims = tl.arange(0, 64), tl.load(dims_at + CHUNK * (D // CHUNKS) + tl.arange(0, D // CHUNKS))
    first = tl.program_id(0) * 64
    x = vectors(codes, (first + n).to(tl.int64) * WIDTH, dims, table, D, KIND, CHUNK, CHUNKS, FOR_SCORES, ASM)
    tl.store(out + (first + row_order(n))[:, None] * D + dims[None, :], x)


def decoding(name: str) -> dict:
    """The largest difference of assembly and twin from the codec's own values, over random codes."""
    worst = {"asm": 0.0, "twin": 0.0}
    for dim, for_scores in itertools.product(SIZES, (True, False)):
        codec = make_codec(name, dim)
        width = codec.planes[0].width
        codes = torch.randint(0, 256, (64 * 32, width), dtype=torch.uint8, device="cuda")
        expected = codec.decode((codes, torch.ones(len(codes), 1, dtype=torch.float16, device="cuda")))
        parts = chunks(dim, name)
        dims, _ = column_dims(name, dim, for_scores, parts, "cuda")
        as_bytes = for_scores and in_bytes(name)
        for form in worst:
            out = torch.full((len(codes), dim), float("nan"), dtype=torch.float16, device="cuda")
            if as_bytes:
                out = torch.full_like(out, -128, dtype=torch.int8)  # the lowest: wrong almost everywhere
            for chunk in range(parts):
                _dump[(32,)](
                    codes,
                    out,
                    dims,
                    table(name, for_scores, "cuda"),
                    dim,
                    width,
                    name,
                    chunk,
                    parts,
                    for_scores,
                    form == "asm",
                )
            values = (2 * out.float() + byte_offset(name)) * byte_unit(name) / 2 if as_bytes else out.float()
            worst[form] = max(worst[form], float((values - expected).abs().nan_to_num(1e9).max()))
    return {"decoding": name, **worst, "bad": max(worst.values()) > SIGMAS.get(name, 0.0)}


def attention(number: int) -> dict:
    """One head size and pair of types."""
    dim, (type_k, type_v) = list(itertools.product(SIZES, PAIRS))[number]
    ratio = RATIOS[(number + number // len(PAIRS)) % len(RATIOS)]
    dtype = torch.bfloat16 if number % 3 else torch.float16
    sink, recent = WINDOWS[number % len(WINDOWS)]
    turning = (dim // 2, dim // 8, 0)[number % 3]
    case = Case(dim, 2 * ratio, 2, type_k, type_v, LENGTHS, sink, recent, number % 5 != 0, turning, dtype)
    ours, plain = errors(case, attend_one, "cuda")
    ok = ours <= 2 * plain
    return {
        "head_dim": dim,
        "k": type_k,
        "v": type_v,
        "group": ratio,
        "dtype": str(dtype)[6:],
        "error": ours,
        "plain": plain,
        "bad": not ok,
    }


def main() -> None:
    started = time.time()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(int(sys.argv[1]) if len(sys.argv) > 1 else 8, mp_context=context) as pool:
        decoded = pool.map(decoding, [*SCALAR_BITS, *TRELLISES])
        attended = pool.map(attention, range(len(SIZES) * len(PAIRS)))
        rows = []
        for row in decoded:
            rows.append(row)
            print(
                f"{row['decoding']:7} asm {row['asm']:.1e} twin {row['twin']:.1e} {'BAD' if row['bad'] else ''}",
                flush=True,
            )
        for row in attended:
            rows.append(row)
            label = f"{row['head_dim']:4} {row['k']:7}{row['v']:7} x{row['group']:<3} {row['dtype']:9}"
            ratio, bad = row["error"] / row["plain"], "BAD" if row["bad"] else ""
            print(f"{label} error {row['error']:.1e}, {ratio:.2f} x PyTorch's {bad}", flush=True)
    print(f"{len(rows)} rows, {sum(row['bad'] for row in rows)} outside the contract, {time.time() - started:.0f} s")
    print(
        json.dumps(
            {
                **stamp(),
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
