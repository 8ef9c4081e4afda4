"""The Triton kernels of decoding, in Triton's interpreter: a part of what benchmarks/kv_kernel_matrix.py runs on a GPU.

The interpreter cannot run the assembly, so its plain twin decodes here. That the assembly compiles for the GPUs that
people have is tested too, in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.kv.contract import Case, errors, filled, fresh, open_step
from turbomoe.config import KVSettings
from turbomoe.kv import decode
from turbomoe.kv.cache import KVCache
from turbomoe.kv.kernels import decode_attention, unsupported
from turbomoe.kv.shape import AttentionShape

pytest.importorskip("triton")

CASES = [
    Case(64, 4, 2, "tq2", "tcq2", (0, 1, 40, 150)),
    Case(64, 16, 1, "tcq2.5", "tq3", (105, 7), turning_pairs=32),
    Case(64, 3, 3, "tcq3", "tq4", (41, 130), means=False),
    Case(128, 4, 1, "tcq4", "tcq2.5", (200, 50, 3), turning_pairs=0),
    Case(128, 2, 2, "tq4", "tcq3", (129,), sink=0, recent=64),
    Case(256, 8, 2, "tq3", "tcq4", (150,)),
    Case(256, 4, 2, "tcq2", "tcq3", (107, 0)),
    Case(64, 4, 2, "q8_0", "bf16", (150, 3)),
    Case(64, 4, 2, "f16", "q8_0", (150,)),
    Case(64, 4, 2, "bf16", "bf16", (0, 70), sink=0, recent=0),
    Case(64, 4, 2, "tq4", "tcq4", (0, 1, 70), sink=0, recent=0),
    Case(64, 4, 2, "tcq4", "tq4", (0, 7, 8, 80), sink=8, recent=0),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.head_dim} {c.type_k} {c.type_v} {c.sink} {c.recent}")
def test_the_error_is_at_most_twice_that_of_plain_pytorch(case: Case) -> None:
    from turbomoe.kv.kernels.launch import attend_one

    ours, plain = errors(case, attend_one, "cpu")
    assert ours <= 2 * plain


@pytest.mark.parametrize("windows", [(8, 32), (8, 0), (0, 0), (0, 16)], ids=str)
@pytest.mark.parametrize("lengths", [(0, 1, 8), (39, 40, 41), (100, 5)], ids=str)
def test_the_new_token_is_stored_as_the_reference_stores_it(lengths: tuple[int, ...], windows: tuple[int, int]) -> None:
    from turbomoe.kv.kernels.launch import attend_one

    case = Case(64, 2, 2, "tq3", "tq3", lengths, *windows)
    stored = []
    for attend in (attend_one, decode.attend_one):
        cache = filled(case, "cpu")
        query, key, value = fresh(case, len(lengths), 1, torch.Generator().manual_seed(7), "cpu")
        attend(query, key, value, *cache.attention[0], open_step(cache, list(range(len(lengths)))), 0.125)
        stored.append([t for side in cache.attention[0] for t in (side.sinks, side.ring, *side.planes)])
    for ours, reference in zip(*stored, strict=True):
        assert torch.equal(ours.view(torch.uint8), reference.view(torch.uint8))


@pytest.mark.parametrize("length", [3, 16, 200])
def test_a_sliding_window_reads_its_ring_and_no_pages(length: int) -> None:
    from turbomoe.kv.kernels.launch import attend_one

    shapes = [AttentionShape(0, 4, 2, 64, window=17), AttentionShape(1, 4, 2, 64)]
    random = torch.Generator().manual_seed(3)
    cache = KVCache(shapes, KVSettings("tq3", "tq3", 4, 16), slots=1, ctx_size=300)
    cache.reserve(0, length + 1)
    cache.host_lengths[0] = length
    cache.lengths[0] = length
    for side in cache.attention[0]:
        side.ring.copy_(torch.randn(side.ring.shape, generator=random))
    made = fresh(Case(64, 4, 2, "tq3", "tq3", (length,)), 1, 1, random, "cpu")
    # The reference first: it stores the same token over the same row, so the kernel must find the ring as it was.
    rings = [side.ring.clone() for side in cache.attention[0]]
    expected = decode.attend_one(*made, *cache.attention[0], open_step(cache, [0]), 0.125)
    for side, ring in zip(cache.attention[0], rings, strict=True):
        side.ring.copy_(ring)
    found = attend_one(*made, *cache.attention[0], open_step(cache, [0]), 0.125)
    assert (found - expected).norm() <= 5e-3 * expected.norm()


def test_stale_rows_do_not_reach_the_result() -> None:
    """Scales and exact values that belong to nobody may be NaN."""
    from turbomoe.kv.kernels.launch import attend_one

    case = Case(64, 4, 2, "tcq3", "tq2", (100,), means=False)
    cache, dirty = filled(case, "cpu"), filled(case, "cpu")
    for side in dirty.attention[0]:
        coded, page = case.lengths[0] - case.sink - case.recent, int(dirty.pages.table[0, 0])
        side.planes[1][page, :, coded:] = float("nan")
        side.ring[1:] = side.sinks[1:] = float("nan")
    query, key, value = fresh(case, 1, 1, torch.Generator().manual_seed(7), "cpu")
    clean, found = (attend_one(query, key, value, *c.attention[0], open_step(c, [0]), 0.125) for c in (cache, dirty))
    assert torch.equal(clean, found)


def test_a_value_scale_of_zero_counts_in_the_sum_and_adds_nothing() -> None:
    from turbomoe.kv.kernels.launch import attend_one

    case = Case(64, 2, 2, "tq4", "tq4", (150,), means=False)
    query, key, value = fresh(case, 1, 1, torch.Generator().manual_seed(7), "cpu")
    found = []
    for attend in (attend_one, decode.attend_one):
        cache = filled(case, "cpu")
        cache.attention[0][1].planes[1][:, :, ::3] = 0.0
        found.append(attend(query, key, value, *cache.attention[0], open_step(cache, [0]), 0.125))
    assert (found[0] - found[1]).norm() <= 2e-3 * found[1].norm()


def test_the_kernels_say_what_they_do_not_run() -> None:
    assert "80 values" in unsupported(80, 4)
    assert "32 query heads" in unsupported(128, 32)
    assert "float32" in unsupported(128, 4, torch.float32)
    assert unsupported(256, 16) == unsupported(64, 1, torch.float16) == ""
    assert decode_attention("cpu", 128, 4, torch.bfloat16) is decode.attend_one
    assert decode_attention("cuda", 80, 4, torch.bfloat16) is decode.attend_one


COMPILE = """
from tests.kv.early_start import attend
for capability in (80, 89, 90, 120):
    assert "prmt.b32" in attend({dim}, "{k}", "{v}", capability, early=False)[0]
print("compiled")
"""


@pytest.mark.parametrize(("dim", "k", "v"), [
    (128, "tcq3", "tcq2"), (128, "tq3", "tcq2.5"), (256, "tq2", "tcq4"), (64, "q8_0", "tq4"),
])  # fmt: skip
def test_the_assembly_compiles_for_gpus_from_ampere_to_blackwell(dim: int, k: str, v: str, tmp_path: object) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE.format(dim=dim, k=k, v=v)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "compiled", done.stderr[-2000:]
