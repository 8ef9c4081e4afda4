"""A whole context of Qwen3.5-397B's attention layers, really allocated on this GPU and attended to.

    python benchmarks/kv_memory.py

15 layers of 2 KV heads of 256 values, 262,144 tokens, windows of 64 and 256: the bytes come from the allocator, not
from arithmetic. Every layer is then attended to by one new token over the full length; the first and the last are
compared
with float64. Codes are random, as any bits are a valid code. Last line: JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from gpu_stamp import stamp

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.kv.contract import dense, hold, open_step, softmax_attention
from turbomoe.config import KVSettings
from turbomoe.kv.cache import KVCache
from turbomoe.kv.kernels.launch import attend_one
from turbomoe.kv.shape import AttentionShape

LAYERS, HEADS, KV_HEADS, DIM, TOKENS = 15, 32, 2, 256, 262144
TYPES = ("tq2", "tcq2", "tcq2.5")


def filled(kind: str) -> tuple[KVCache, int]:
    """A cache of random codes for all but the last token, and the bytes that the allocator gave for it."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    shapes = [AttentionShape(i, HEADS, KV_HEADS, DIM) for i in range(LAYERS)]
    settings = KVSettings(kind, kind)
    cache = KVCache(shapes, settings, slots=1, ctx_size=TOKENS, dtype=torch.bfloat16, device="cuda")
    allocated = torch.cuda.memory_allocated() - before
    hold(cache, TOKENS - 1)
    return cache, allocated


def error(cache: KVCache) -> float:
    """The worst error of decode attention relative to float64, over the first and the last layer; all are run."""
    step, scale, worst = open_step(cache, [0]), DIM**-0.5, 0.0
    query = torch.randn(1, HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16)
    key, value = torch.randn(2, 1, KV_HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16)
    for layer, (keys, values) in cache.attention.items():
        oracle = None
        if layer in (0, LAYERS - 1):  # before the windows take the new token in
            whole = dense(keys, key, step, 0), dense(values, value, step, 0)
            oracle = softmax_attention(query[0, :, 0].double(), *whole, scale)
        ours = attend_one(query, key, value, keys, values, step, scale)[0, 0]
        assert ours.isfinite().all()
        if oracle is not None:
            worst = max(worst, float((ours.double() - oracle).norm() / oracle.norm()))
    return worst


def main() -> None:
    rows = []
    for kind in TYPES:
        cache, allocated = filled(kind)
        rows.append({"type": kind, "allocated": allocated, "error": error(cache)})
        size = f"{allocated / 1e9:.3f} GB allocated for {TOKENS} tokens, {LAYERS} layers"
        print(f"{kind:7} {size}; error {rows[-1]['error']:.1e}")
        del cache
    print(json.dumps({**stamp(), "rows": rows}))


if __name__ == "__main__":
    main()
