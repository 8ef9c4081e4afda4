"""Every KV kernel against its contract, on this GPU: the full matrix of which ``make test`` runs a part.

    python benchmarks/kv_kernel_matrix.py

For each head size and pair of types: the worst error relative to a float64 oracle, over lengths, ratios of query to KV
heads and batches, beside that of plain PyTorch in the same precision, and whether the assembly equals its plain twin.
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.kv.contract import Case, errors  # noqa: E402
from turbomoe.kv.kernels.launch import attend_one  # noqa: E402

TYPES = ("f16", "bf16", "q8_0", "tq2", "tq3", "tq4", "tcq2", "tcq2.5", "tcq3", "tcq4")
PAIRS = [*((t, t) for t in TYPES), ("tcq3", "tcq2"), ("tcq2.5", "tcq2"), ("q8_0", "tq3"), ("bf16", "tcq3"), ("tq4", "bf16")]
LENGTHS = ((0, 1, 40), (41, 105, 1000), (4097,))
RATIOS = (1, 3, 8, 16)


def main() -> None:
    started, lines, bad = time.time(), [], 0
    for head_dim, (type_k, type_v) in itertools.product((64, 128, 256), PAIRS):
        worst, own, twin = (0.0, ""), 0.0, 0.0
        for lengths, ratio in itertools.product(LENGTHS, RATIOS):
            case = Case(head_dim, 2 * ratio, 2, type_k, type_v, lengths, means=ratio != 3)
            ours, plain = errors(case, attend_one, "cuda")
            plainly, _ = errors(case, functools.partial(attend_one, asm=False), "cuda")
            worst, own = max(worst, (ours / plain, f"{lengths} x{ratio}")), max(own, ours)
            twin = max(twin, plainly / plain)
        bad += worst[0] > 2 or twin > 2 or worst[0] != worst[0]
        lines.append({"head_dim": head_dim, "k": type_k, "v": type_v, "ratio": worst[0], "at": worst[1], "error": own, "twin": twin})
        print(f"{head_dim:4} {type_k:7}{type_v:7} error {own:.1e}, {worst[0]:.2f} x PyTorch's at {worst[1]}, twin {twin:.2f}", flush=True)
    print(f"{len(lines)} pairs, {bad} outside the contract, {time.time() - started:.0f} s")
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": lines}))


if __name__ == "__main__":
    main()
