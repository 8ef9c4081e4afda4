"""Prefill's kernels in Triton's interpreter, against the reference and the oracle of ``prefill_contract.py``.

Whether a kernel is interpreted is decided when it is defined, so the tests run in a process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.kv.contract import filled
from tests.kv.prefill_contract import Chunk, errors, stored_and_attended
from turbomoe.config import KVSettings
from turbomoe.kv import attention
from turbomoe.kv.cache import KVCache
from turbomoe.kv.kernels import prefill_attention
from turbomoe.kv.layer import Side
from turbomoe.kv.prefill import attend_block as reference
from turbomoe.kv.shape import AttentionShape

pytest.importorskip("triton")
ALONE = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not ALONE, reason="runs in a process of its own")
if ALONE:
    from turbomoe.kv.kernels import prefill_launch

CODED = ("q8_0", "tq2", "tq3", "tq4", "tcq2", "tcq2.5", "tcq3", "tcq4")
SHAPES = [(64, 6, 2), (128, 16, 1), (256, 2, 2)]
PAIRS = [*((kind, kind) for kind in (*CODED, "bf16", "f16")), ("bf16", "tcq2"), ("tq3", "f16"), ("q8_0", "tq2")]
HALF = 2.0**-10  # queries, levels, weights and values are rounded to float16 once each, by at most 2**-11


@pytest.mark.skipif(ALONE, reason="is that process")
def test_in_a_process_of_its_own():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


# Every kind at the smallest head, and at the others what reads its words otherwise there.
CONTRACT = [(SHAPES[0], pair) for pair in PAIRS]
CONTRACT += [(shape, (kind, kind)) for shape in SHAPES[1:] for kind in ("q8_0", "tq4", "tcq2.5", "tcq4", "bf16")]


@interpreted
@pytest.mark.parametrize("shape,types", CONTRACT)
@pytest.mark.parametrize("means", [False, True])
def test_the_contract(shape, types, means):
    """For turning means, key scales and all kinds: sequences without a past, with a short and with a longer one."""
    head_dim, heads, kv_heads = shape
    chunk = Chunk(head_dim, heads, kv_heads, *types, (110, 0, 41), count=21, means=means, dtype=torch.float16)
    ours, plain = errors(chunk, prefill_launch.attend_block, "cpu")
    assert ours <= 2 * plain


@interpreted
@pytest.mark.parametrize("count,lengths", [(2, (40, 41, 42)), (130, (7,)), (33, (104, 105, 168))])
@pytest.mark.parametrize("sink,recent", [(8, 32), (0, 0), (0, 5), (70, 0)])
def test_windows_and_lengths(count, lengths, sink, recent):
    chunk = Chunk(64, 4, 2, "tq3", "tcq3", lengths, sink, recent, dtype=torch.float16, count=count, looked_at=9)
    ours, plain = errors(chunk, prefill_launch.attend_block, "cpu")
    assert ours <= 2 * plain


@interpreted
@pytest.mark.parametrize("rows,slab_blocks,processors", [(64, 99, 1), (64, 99, 64), (64, 1, 1), (64, 1, 64)])
@pytest.mark.parametrize("type_k,type_v", [("tq2", "tcq3"), ("q8_0", "bf16"), ("bf16", "bf16")])
def test_slabs_and_parts(monkeypatch, rows, slab_blocks, processors, type_k, type_v):
    """Decoded in registers or by slabs of 16 pages, in one part or many: the same attention."""
    monkeypatch.setattr(prefill_launch, "ROWS", rows)
    monkeypatch.setattr(prefill_launch, "SLAB_BLOCKS", slab_blocks)
    monkeypatch.setattr(prefill_launch, "SLAB_BYTES", 0)
    monkeypatch.setattr(prefill_launch, "_processors", lambda device: processors)
    chunk = Chunk(64, 2, 1, type_k, type_v, (1300, 900), count=33, dtype=torch.float16)
    ours, plain = errors(chunk, prefill_launch.attend_block, "cpu")
    assert ours <= 2 * plain


def outputs(chunks: list[int], type_k: str, type_v: str, window: int = 0) -> torch.Tensor:
    """A sequence of 3 KV heads of 64, 2 queries each, taken in these chunks: [tokens, 6, 64]."""
    g = torch.Generator().manual_seed(4)
    cache = KVCache(
        [AttentionShape(0, 6, 3, 64, window=window)], KVSettings(type_k, type_v, 5, 20), slots=2, ctx_size=400
    )
    q, k, v = (torch.randn(1, heads, sum(chunks), 64, generator=g).half() for heads in (6, 3, 3))
    found, at = [], 0
    for count in chunks:
        cache.begin([1], count)
        found.append(cache.attend(0, *(x[:, :, at : at + count] for x in (q, k, v)), 0.125).float()[0])
        cache.commit()
        at += count
    return torch.cat(found)


@interpreted
@pytest.mark.parametrize(
    "type_k,type_v,window", [("tq3", "tcq2", 0), ("q8_0", "bf16", 0), ("bf16", "bf16", 0), ("tq3", "tq3", 50)]
)
def test_every_chunking_gives_what_the_reference_gives(monkeypatch, type_k, type_v, window):
    """Through ``attention.attend``, whose kernel for a GPU stands in here; layers with a sliding window too."""
    wanted = outputs([230], type_k, type_v, window)
    monkeypatch.setattr(attention, "prefill_attention", lambda *_: prefill_launch.attend_block)
    for chunks in ([230], [7, 130, 2, 1, 90], [64] * 3 + [38]):
        got = outputs(chunks, type_k, type_v, window)
        assert (got - wanted).norm() <= 1.5 * HALF * wanted.norm()
        assert (got - wanted).norm(dim=-1).max() <= 8 * HALF * wanted.norm(dim=-1).max()


@interpreted
@pytest.mark.parametrize("slab_blocks", [1, 99])
@pytest.mark.parametrize("kind", ["tq3", "tcq2", "q8_0", "f16"])
def test_what_nobody_wrote_is_not_read(monkeypatch, kind, slab_blocks):
    """Rows beyond a sequence's end and pages of others hold NaN, in scales and in values."""
    monkeypatch.setattr(prefill_launch, "SLAB_BLOCKS", slab_blocks)
    chunk = Chunk(64, 2, 1, kind, kind, (90, 10), count=30, dtype=torch.float16)
    cache = filled(chunk, "cpu", chunk.count)
    keys, values = cache.attention[0]
    for side in (keys, values):
        for plane in (p for p in side.planes if p.is_floating_point()):
            for slot, length in enumerate(chunk.lengths):
                owned, coded = cache.pages.owned(slot), max(0, length - side.sink - side.recent)
                flat = plane[owned].transpose(1, 2).flatten(0, 1)
                flat[coded:] = float("nan")
                plane[owned] = flat.unflatten(0, (-1, 64)).transpose(1, 2)
            plane[0] = float("nan")
    step = cache.begin([0, 1], chunk.count)
    new = [torch.randn(2, heads, chunk.count, 64).half() for heads in (2, 1, 1)]
    out, *_ = stored_and_attended(*new, keys, values, step, 0.125, prefill_launch.attend_block)
    assert out.isfinite().all()


class Allocated(TorchDispatchMode):
    """Bytes of all tensors that operations make, and not only look at."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in inputs:
                self.nbytes += x.untyped_storage().nbytes()
        return out


class Nothing:
    """Stands in for a kernel."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@interpreted
@pytest.mark.parametrize("slab_blocks", [1, 99])
def test_memory_does_not_grow_with_the_context(monkeypatch, slab_blocks):
    """All that a block allocates, added up (its peak is at most that), is the same after 5,000 and 30,000 tokens."""
    monkeypatch.setattr(prefill_launch, "SLAB_BLOCKS", slab_blocks)
    monkeypatch.setattr(prefill_launch, "SLAB_BYTES", 1 << 20)
    for kernel in ("exact", "coded", "expand"):
        monkeypatch.setattr(prefill_launch.prefill, kernel, Nothing())
    found = []
    for length in (5_000, 30_000):
        chunk = Chunk(64, 8, 2, "tq3", "tcq2", (length,), 64, 256, count=64)
        cache = filled(chunk, "cpu", chunk.count)
        keys, values = cache.attention[0]
        step = cache.begin([0], chunk.count)
        query, exact = torch.randn(1, 8, 64, 64).bfloat16(), torch.randn(1, 2, 320, 64).bfloat16()
        with Allocated() as allocated:
            prefill_launch.attend_block(query, 0, exact, exact, keys, values, step, 0.125)
        found.append(allocated.nbytes)
    assert found[0] == found[1]
    slab = (1 << 20) + 8 * 64 if slab_blocks == 1 else 0
    assert 0 < found[0] - slab < 24 * query.numel() * 4


def side(kind: str, dim: int = 64) -> Side:
    cache = KVCache([AttentionShape(0, 4, 2, dim)], KVSettings(kind, kind), slots=1, ctx_size=64, device="meta")
    return cache.attention[0][0]


class FakeQuery:
    """What the choice looks at, of a tensor on a device that this machine may lack."""

    def __init__(self, device: str, dtype: torch.dtype, dim: int = 64, heads: int = 4) -> None:
        self.device, self.dtype, self.shape = torch.device(device), dtype, (1, heads, 9, dim)


def test_who_gets_the_kernel():
    keys = side("tq3")
    assert prefill_attention(FakeQuery("cuda", torch.bfloat16), keys, keys).__module__.endswith("prefill_launch")
    assert prefill_attention(FakeQuery("cpu", torch.bfloat16), keys, keys) is reference
    assert prefill_attention(FakeQuery("cuda", torch.float32), keys, keys) is reference
    assert prefill_attention(FakeQuery("cuda", torch.bfloat16), side("f32"), keys) is reference
    assert prefill_attention(FakeQuery("cuda", torch.bfloat16, heads=34), keys, keys) is reference
    assert prefill_attention(FakeQuery("cuda", torch.bfloat16, dim=96), side("q8_0", 96), keys) is reference
