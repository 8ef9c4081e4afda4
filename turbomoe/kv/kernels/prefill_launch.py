"""Attention of a block of new tokens on a GPU: what ``kv/prefill.py`` computes, by the kernels of ``prefill.py``.

Beside the cache it needs a few tensors of the block's size and a slab of decoded pages, whatever the length of the
context: where many programs would each decode the same pages, a slab is decoded first and then read by all of them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from turbomoe.kv.hadamard import rotation
from turbomoe.kv.kernels import prefill
from turbomoe.kv.kernels.layout import column_dims
from turbomoe.kv.kernels.stored import code_bytes, interpreted, kind_of, processors, stored
from turbomoe.kv.layer import Side, Step
from turbomoe.kv.pages import PAGE_TOKENS, pages_for
from turbomoe.kv.turns import waves

LOG2E = 1.4426950408889634
CHANNELS = 32  # ``prefill.CHANNELS``
SPLIT_PAGES = 8  # a part has at least as many
SLAB_BLOCKS = 4  # blocks of queries that have to share a slab for it to be worth its stores
SLAB_BYTES = 32 << 20  # of keys and values together
EXACT_NAMES = {torch.float16: "f16", torch.bfloat16: "bf16"}
TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def program(shared: int) -> tuple[int, int, int]:
    """(queries, warps, stages of prefetching) of a program on a processor with this shared memory, in bytes.

    At 256 dims queries, two tiles of keys and two of values take 192 KiB; less than that has room for half the queries
    and one tile of each.
    """
    return (128, 8, 2) if shared >= 200 << 10 else (64, 4, 1)


@functools.lru_cache(maxsize=8)
def _program(device: torch.device) -> tuple[int, int, int]:
    """``program`` for this device; the interpreter takes any."""
    if device.type == "cpu":
        return program(0)
    index = device.index or 0  # tensors know their device's number
    return program(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


@dataclass(frozen=True)
class Parts:
    """What programs leave, float32: tops and totals of softmaxes [P, B * kv_heads, rows], means [..., dim]."""

    tops: torch.Tensor
    totals: torch.Tensor
    far: torch.Tensor

    @classmethod
    def empty(cls, parts: int, heads: int, rows: int, dim: int, device: torch.device) -> Parts:
        """Room for ``parts`` parts."""
        tops, totals = torch.empty(2, parts, heads, rows, dtype=torch.float32, device=device)
        return cls(tops, totals, torch.empty(parts, heads, rows, dim, dtype=torch.float32, device=device))

    def among(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Parts [first, last)."""
        return self.tops[first:last], self.totals[first:last], self.far[first:last]


@dataclass(frozen=True)
class Pages:
    """Where the coded kernel reads one side: its kind, bytes a code, and (codes, scales, dims, table)."""

    kind: str
    width: int
    stored: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, side: Side) -> Pages:
        """The pages of the cache."""
        dim, device = side.ring.shape[-1], str(side.ring.device)
        return cls(kind_of(side), code_bytes(side), stored(side, dim, False, 1, device)[:4])

    def slab(self, batch: int, pages: int, kv_heads: int, dim: int) -> Pages:
        """Room for decoded pages [B, pages, kv_heads, PAGE_TOKENS, dim], with their dims in the order of these."""
        kind = self.kind if self.kind in EXACT_NAMES.values() else "f16"
        dtype = torch.bfloat16 if kind == "bf16" else torch.float16
        codes = torch.empty(batch, pages, kv_heads, PAGE_TOKENS, dim, dtype=dtype, device=self.stored[0].device)
        return Pages(kind, dim, (codes, codes, *self.stored[2:]))


@dataclass(frozen=True)
class Block:
    """Queries q [B, kv_heads, rows, dim] of the chunk's positions ``first`` and on, row r of position r // group."""

    q: torch.Tensor
    first: int
    group: int
    scale: float
    model: torch.dtype
    asm: bool

    @property
    def heads(self) -> int:
        return self.q.shape[0] * self.q.shape[1]

    @property
    def rows(self) -> int:
        return self.q.shape[2]

    @property
    def blocks(self) -> int:
        return -(-self.rows // _program(self.q.device)[0])

    def options(self, k_as: torch.dtype, v_as: torch.dtype) -> dict[str, object]:
        """What both kernels are told."""
        rows, warps, stages = _program(self.q.device)
        shape = {"KV_HEADS": self.q.shape[1], "GROUP": self.group, "D": self.q.shape[-1], "ROWS": rows}
        types = {"K_AS": TYPES[k_as], "V_AS": TYPES[v_as], "PRECISION": "tf32" if self.asm else "ieee"}
        return {**shape, **types, "STAGES": stages, "num_warps": warps}


def attend_block(
    query: torch.Tensor, first: int, exact_k: torch.Tensor, exact_v: torch.Tensor, keys: Side, values: Side,
    step: Step, scale: float, asm: bool = True,
) -> torch.Tensor:  # fmt: skip
    """``prefill.attend_block``: query [B, heads, n, dim], exact_k, exact_v [B, kv_heads, recent + S, dim].

    Float32 [B, n, heads, dim].
    """
    (batch, heads, count, dim), (kv_heads, window) = query.shape, exact_k.shape[1:3]
    group = heads // kv_heads
    q = query.reshape(batch, kv_heads, group, count, dim).transpose(2, 3).reshape(batch, kv_heads, -1, dim).contiguous()
    block = Block(q, first, group, scale, query.dtype, asm and not interpreted())
    reach = step.reach - step.count + first + count - 1 - keys.sink - keys.recent
    pages = 0 if keys.codec is None else pages_for(reach)
    splits = _splits(pages, block)
    parts = Parts.empty(splits + 1, block.heads, block.rows, dim, query.device)
    prefill.exact[(block.blocks, block.heads)](
        q, step.starts, step.slots, keys.sinks, values.sinks, exact_k.contiguous(), exact_v.contiguous(),
        *parts.among(splits, splits + 1), scale * LOG2E, first, block.rows, window, SINK=keys.sink,
        RECENT=keys.recent, **block.options(*(_product_type(EXACT_NAMES[x.dtype], block) for x in (exact_k, exact_v))),
    )  # fmt: skip
    if splits:
        _attend_pages(block, parts, keys, values, step, pages)
    out = _merged(parts, values).reshape(batch, kv_heads, count, group, dim)
    return out.transpose(1, 2).reshape(batch, count, heads, dim)


def _product_type(kind: str, block: Block) -> torch.dtype:
    """Of products with what is stored in this kind: float16 wherever something is float16, for its steps are finer.

    The interpreter's products of bf16 are wrong: there what is exact is float32.
    """
    if kind not in EXACT_NAMES.values():
        return torch.float16
    if not block.asm:
        return torch.float32
    return torch.bfloat16 if kind == "bf16" and block.model == torch.bfloat16 else torch.float16


def _splits(pages: int, block: Block) -> int:
    """Parts into which the pages are cut, so that few queries too keep every processor busy; 0 without pages."""
    programs = block.blocks * block.heads
    return 0 if pages == 0 else max(1, min(pages // SPLIT_PAGES, processors(block.q.device) // programs))


def _attend_pages(block: Block, parts: Parts, keys: Side, values: Side, step: Step, pages: int) -> None:
    """Fill all parts but the last, from the cache's pages or slab by slab."""
    k, v = Pages.of(keys), Pages.of(values)
    inputs = _queries(block, keys, k)
    exact = k.kind in EXACT_NAMES.values() and v.kind in EXACT_NAMES.values()
    if exact or block.blocks < SLAB_BLOCKS:
        _launch(block, parts, inputs, k, v, step, step.pages, 0)
        return
    batch, kv_heads, _, dim = block.q.shape
    size = min(pages, max(16, SLAB_BYTES // (4 * block.heads * PAGE_TOKENS * dim) // 16 * 16))
    slab_k, slab_v = (side.slab(batch, size, kv_heads, dim) for side in (k, v))
    table = torch.arange(batch * size, device=block.q.device).view(batch, size)
    for origin in range(0, pages, size):
        for side, slab in ((k, slab_k), (v, slab_v)):
            prefill.expand[(size, block.heads)](
                step.pages, *side.stored, slab.stored[0], origin, step.pages.shape[1], KV_HEADS=kv_heads, D=dim,
                KIND=side.kind, WIDTH=side.width, ASM=block.asm, num_warps=4,
            )  # fmt: skip
        _launch(block, parts, inputs, slab_k, slab_v, step, table, origin)


@dataclass(frozen=True)
class Inputs:
    """Queries as keys' codes want them, and what their means need; see ``prefill.coded``."""

    q: torch.Tensor
    pairs: torch.Tensor
    still: torch.Tensor
    turns: torch.Tensor
    has_mean: bool
    behind: int


@functools.lru_cache(maxsize=16)
def _rotation(kind: str, dim: int, device: str) -> torch.Tensor:
    """The rotation with its columns in the order of the kernels' tiles: float32 [dim, dim]."""
    return rotation(dim, device)[:, column_dims(kind, dim, False, 1, device)[0].long()].contiguous()


def _queries(block: Block, keys: Side, k: Pages) -> Inputs:
    q, dim, device = block.q.float(), block.q.shape[-1], str(block.q.device)
    turned = keys.spread(q) @ _rotation(k.kind, dim, device) if keys.rotated else block.q
    turned, behind = turned.to(_product_type(k.kind, block)), keys.sink + keys.recent
    if keys.mean is None:
        return Inputs(turned, turned, turned, turned, False, behind)
    assert keys.turns is not None
    r = keys.turns.shape[-1] // 2
    pairs, still = waves(q, keys.mean[:, None, :] * (block.scale * LOG2E), r)
    pairs = torch.nn.functional.pad(pairs, (0, -2 * r % CHANNELS)).contiguous()
    return Inputs(turned, pairs, still, keys.turns, True, behind)


def _launch(
    block: Block, parts: Parts, inputs: Inputs, k: Pages, v: Pages, step: Step, table: torch.Tensor, origin: int
) -> None:
    """Fill the parts from pages ``origin`` and on, as many as ``table`` [B, pages] has; later calls add to earlier."""
    splits = len(parts.tops) - 1
    prefill.coded[(block.blocks, splits, block.heads)](
        inputs.q, inputs.pairs, inputs.still, step.starts, table, inputs.turns, *k.stored, *v.stored,
        *parts.among(0, splits), block.scale * LOG2E, block.first, block.rows, origin, table.shape[1],
        len(inputs.turns), BEHIND=inputs.behind, K_KIND=k.kind, V_KIND=v.kind, K_WIDTH=k.width, V_WIDTH=v.width,
        HAS_MEAN=inputs.has_mean, WIDTH=inputs.pairs.shape[-1], TURNS=inputs.turns.shape[-1], CARRY=origin > 0,
        ASM=block.asm, **block.options(*(_product_type(side.kind, block) for side in (k, v))),
    )  # fmt: skip


def _merged(parts: Parts, values: Side) -> torch.Tensor:
    """One softmax of all parts, what came from pages turned back: float32 [B * kv_heads, rows, dim]."""
    weights = torch.exp2(parts.tops - parts.tops.amax(0)).mul_(parts.totals)
    weights /= weights.sum(0)
    out = parts.far[-1].mul_(weights[-1, ..., None])
    if len(weights) == 1:
        return out
    pages = parts.far[0].mul_(weights[0, ..., None])
    for weight, far in zip(weights[1:-1], parts.far[1:-1], strict=True):
        pages.addcmul_(far, weight[..., None])
    if values.rotated:
        pages = pages @ _rotation(kind_of(values), out.shape[-1], str(out.device)).t()
    if values.mean is not None:
        mean = values.mean.repeat(len(out) // len(values.mean), 1)[:, None]
        pages = pages.addcmul(weights[:-1].sum(0)[..., None], mean)
    return out.add_(pages)
