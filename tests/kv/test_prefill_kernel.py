"""Prefill's kernels in Triton's interpreter, against the reference and the oracle of ``prefill_contract.py``.

The interpreter runs the plain twin of the assembly. That the kernels compile for GPUs with little and with much shared
memory, and fit it, is tested too, in a process of its own.
"""

import os
import subprocess
import sys

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
from turbomoe.kv.kernels.checked import Checked
from turbomoe.kv.prefill import attend_block as reference
from turbomoe.kv.shape import AttentionShape

pytest.importorskip("triton")
from turbomoe.kv.kernels import prefill_launch

CODED = ("q8_0", "tq2", "tq3", "tq4", "tcq2", "tcq2.5", "tcq3", "tcq4")
SHAPES = [(64, 6, 2), (128, 16, 1), (256, 2, 2)]
PAIRS = [*((kind, kind) for kind in (*CODED, "bf16", "f16")), ("bf16", "tcq2"), ("tq3", "f16"), ("q8_0", "tq2")]
HALF = 2.0**-10  # queries, levels, weights and values are rounded to float16 once each, by at most 2**-11


# Every kind at the smallest head, and at the others what reads its words otherwise there.
CONTRACT = [(SHAPES[0], pair) for pair in PAIRS]
CONTRACT += [(shape, (kind, kind)) for shape in SHAPES[1:] for kind in ("q8_0", "tq4", "tcq2.5", "tcq4", "bf16")]


@pytest.mark.parametrize("shape,types", CONTRACT)
@pytest.mark.parametrize("means", [False, True])
def test_the_contract(shape, types, means):
    """For turning means, key scales and all kinds: sequences without a past, with a short and with a longer one."""
    head_dim, heads, kv_heads = shape
    chunk = Chunk(head_dim, heads, kv_heads, *types, (110, 0, 41), count=21, means=means, dtype=torch.float16)
    ours, plain = errors(chunk, prefill_launch.attend_block, "cpu")
    assert ours <= 2 * plain


@pytest.mark.parametrize("count,lengths", [(2, (40, 41, 42)), (130, (7,)), (33, (104, 105, 168))])
@pytest.mark.parametrize("sink,recent", [(8, 32), (0, 0), (0, 5), (70, 0)])
def test_windows_and_lengths(count, lengths, sink, recent):
    chunk = Chunk(64, 4, 2, "tq3", "tcq3", lengths, sink, recent, dtype=torch.float16, count=count, looked_at=9)
    ours, plain = errors(chunk, prefill_launch.attend_block, "cpu")
    assert ours <= 2 * plain


@pytest.mark.parametrize("rows,slab_blocks,processors", [(64, 99, 1), (128, 99, 64), (64, 1, 1), (128, 1, 64)])
@pytest.mark.parametrize("type_k,type_v", [("tq2", "tcq3"), ("q8_0", "bf16"), ("bf16", "bf16")])
def test_slabs_and_parts(monkeypatch, rows, slab_blocks, processors, type_k, type_v):
    """Decoded in registers or by slabs of 16 pages, in one part or many: the same attention."""
    monkeypatch.setattr(prefill_launch, "_program", lambda device: (rows, 4, 1))
    monkeypatch.setattr(prefill_launch, "SLAB_BLOCKS", slab_blocks)
    monkeypatch.setattr(prefill_launch, "SLAB_BYTES", 0)
    monkeypatch.setattr(prefill_launch, "processors", lambda device: processors)
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


def test_who_gets_the_kernel():
    bf16 = torch.bfloat16
    chosen = prefill_attention("cuda", 64, 4, bf16, False)
    assert isinstance(chosen, Checked)
    assert chosen.kernel is prefill_launch.attend_block and chosen.reference is reference
    assert prefill_attention("cpu", 64, 4, bf16, False) is reference
    for refused in ((64, 4, torch.float32, False), (64, 4, bf16, True), (64, 17, bf16, False), (96, 4, bf16, False)):
        assert prefill_attention("cuda", *refused) is reference


COMPILE = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from turbomoe.kv.kernels import prefill, prefill_launch

def compiled(kernel, capability, constants, kinds, warps):
    signature = {n: "constexpr" if n in constants else kinds.get(n, "*fp32") for n in kernel.arg_names}
    pointers = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if signature[n][0] == "*"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=pointers)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    return made.metadata.shared

integers = dict.fromkeys("first rows origin pages_per_slot turn_rows window".split(), "i32")
halves = "q k_scales v_scales scales k_table v_table table k_sinks v_sinks k_fresh v_fresh slab"
kinds = dict(starts="*i64", slots="*i64", pages="*i64", k_dims="*i32", v_dims="*i32", dims="*i32", factor="fp32")
kinds.update(integers | dict.fromkeys(halves.split(), "*fp16"))
for capability, room in ((86, 99), (90, 227)):
    rows, warps, stages = prefill_launch.program(room * 1024)
    shape = dict(KV_HEADS=2, GROUP=16, D=256)
    types = dict(ROWS=rows, STAGES=stages, K_AS=tl.float16, V_AS=tl.float16, PRECISION="tf32")
    for kind, width, stored in (("f16", 256, "*fp16"), ("tq2", 64, "*u8")):
        constants = dict(BEHIND=320, K_KIND=kind, V_KIND=kind, K_WIDTH=width, V_WIDTH=width, HAS_MEAN=True, WIDTH=64,
                         TURNS=64, CARRY=True, ASM=True)
        codes = dict(k_codes=stored, v_codes=stored, codes=stored)
        assert compiled(prefill.coded, capability, constants | shape | types, kinds | codes, warps) <= room * 1024
        constants = dict(KV_HEADS=2, D=256, KIND=kind, WIDTH=width, ASM=True)
        assert compiled(prefill.expand, capability, constants, kinds | codes, 4) <= room * 1024
    assert compiled(prefill.exact, capability, dict(SINK=64, RECENT=256) | shape | types, kinds, warps) <= room * 1024
print("compiled")
"""


def test_the_kernels_compile_and_fit_the_shared_memory(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "compiled", done.stderr[-2000:]
