"""How many of each instruction an SM of this GPU finishes in a clock: the ceiling of decoding and encoding.

    python benchmarks/gpu_instructions.py

One program of 32 warps an SM repeats an instruction on eight independent registers. "Lanes" are results of 32 bits (a
pair of halves counts once) a clock and SM, by the time of the whole launch and the clock that the driver states as the
highest. Then what the assembly of each codec takes of them for a value, unpacking included. Last line JSON.
"""

from __future__ import annotations

import collections
import itertools
import json
import re
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl
from gpu_stamp import stamp

sys.path.insert(0, str(Path(__file__).parent.parent))

from turbomoe.kv.kernels.layout import SCALAR_BITS, block
from turbomoe.kv.trellis_codebook import TRELLISES

CHAINS, UNROLLED, ROUNDS, WARPS = 8, 8, 2000, 32

INSTRUCTIONS = {
    "prmt": "prmt.b32 {r}, {r}, $8, $9;",
    "lop3": "lop3.b32 {r}, {r}, $8, $9, 0x96;",
    "shf (funnel shift)": "shf.r.wrap.b32 {r}, {r}, $8, 7;",
    "add of integers": "add.s32 {r}, {r}, $8;",
    "mad of integers": "mad.lo.s32 {r}, {r}, $8, $9;",
    "fma of two halves": "fma.rn.f16x2 {r}, {r}, $8, $9;",
    "fma of floats": "fma.rn.f32 {r}, {r}, $8, $9;",
    "add and minimum": "{{.reg .b32 p; add.s32 p, {r}, $8; min.s32 {r}, p, $9;}}",
    "add and minimum of two 16-bit integers": "{{.reg .b32 p; add.u16x2 p, {r}, $8; min.u16x2 {r}, p, $9;}}",
}


@triton.jit
def repeat(out, ROUNDS: tl.constexpr, TEXT: tl.constexpr, THREADS: tl.constexpr):
    at = tl.arange(0, THREADS)
    a = at * 7 + 1
    b, c, d, e, f, g, h = a + 1, a + 2, a + 3, a + 4, a + 5, a + 6, a + 7
    one, two = at * 3 + 2, at * 5 + 3
    for _ in range(ROUNDS):
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            TEXT, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,0,1,2,3,4,5,6,7", [one, two, a, b, c, d, e, f, g, h],
            dtype=(tl.int32,) * 8, is_pure=False, pack=1,
        )  # fmt: skip
    tl.store(out + tl.program_id(0) * THREADS + at, a ^ b ^ c ^ d ^ e ^ f ^ g ^ h)


def lanes(line: str) -> float:
    properties = torch.cuda.get_device_properties(0)
    text = "\n".join(line.format(r=f"${chain}") for _ in range(UNROLLED) for chain in range(CHAINS))
    threads, programs = 32 * WARPS, properties.multi_processor_count
    out = torch.empty(programs * threads, dtype=torch.int32, device="cuda")

    def launch() -> None:
        repeat[(programs,)](out, ROUNDS, text, threads, num_warps=WARPS)

    launch()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(3):
        launch()
    end.record()
    end.synchronize()
    clocks = start.elapsed_time(end) / 3 * getattr(properties, "clock_rate", 1_980_000)
    return CHAINS * UNROLLED * ROUNDS * threads / clocks


def per_value(name: str, for_scores: bool) -> dict[str, float]:
    """Instructions a value of a codec, by name: of values as halves or, for scores, keys as bytes; constants are made
    once.
    """
    made = block(name, for_scores)
    found = collections.Counter(re.findall(r"^(\w+)\.(?!reg)", made.text, re.MULTILINE))
    values = (4 if for_scores else 2) * made.outputs
    return {each: count / values for each, count in found.items() if each != "mov"}


def main() -> None:
    found = {name: lanes(line) for name, line in INSTRUCTIONS.items()}
    for name, rate in found.items():
        print(f"{name:40} {rate:6.1f} lanes a clock")
    names = (*SCALAR_BITS, *TRELLISES)
    counts = {side: {name: per_value(name, side == "keys") for name in names} for side in ("keys", "values")}
    for side, name in itertools.product(counts, names):
        kinds = ", ".join(f"{each} {number:.2f}" for each, number in counts[side][name].items())
        print(f"{side:7}{name:7} {sum(counts[side][name].values()):.2f}: {kinds}")
    print(json.dumps({**stamp(), "lanes": found, "per_value": counts}))


if __name__ == "__main__":
    main()
