"""The memory of one sequence as named arrays in order of position: out of one cache, into a slot of another.

Only what the sequence uses is named: no page ids, no padding, no free room. So what was read out of a short context in
one slot goes into a longer one in another. Arrays are read and written one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from turbomoe.errors import ContextFullError
from turbomoe.kv.cache import KVCache, windows
from turbomoe.kv.layer import Side
from turbomoe.kv.pages import PAGE_TOKENS
from turbomoe.kv.recurrent import RecurrentState


@dataclass(frozen=True)
class Part:
    """One array of a slot. ``read`` copies it out, on the cache's device; ``write`` stores one of the same shape."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    write: Callable[[torch.Tensor], None]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def parts(cache: KVCache, slot: int, length: int) -> Iterator[Part]:
    """The arrays that hold the first ``length`` tokens of ``slot``; their reading and writing needs reserved pages.

    A side (``layers.3.keys``) has ``sinks`` [tokens, kv_heads, head_dim], ``recent`` of the same form, and one array
    [tokens, kv_heads, width] for each plane of its codec; a recurrent layer has ``conv`` and ``state``.
    """
    cache.aside.settle()
    for layer, sides in sorted(cache.attention.items()):
        for name, side in zip(("keys", "values"), sides, strict=True):
            yield from _side_parts(cache, f"layers.{layer}.{name}", side, slot, length)
    for layer, state in sorted(cache.recurrent.items()):
        yield from _recurrent_parts(f"layers.{layer}", state, slot)


def nbytes(cache: KVCache, length: int) -> int:
    """Bytes of all parts of a sequence of ``length`` tokens."""
    return sum(part.nbytes for part in parts(cache, 0, length))


def restore(cache: KVCache, slot: int, length: int, read: Callable[[str], torch.Tensor]) -> None:
    """Replace the sequence in ``slot`` by one of ``length`` tokens whose parts ``read`` returns by name.

    The caller has checked names, shapes, types and ``depends_on``. Raises ``ContextFullError`` before anything has
    changed; what ``read`` raises leaves the slot empty.
    """
    if length > cache.ctx_size:
        raise ContextFullError(
            f"{length} tokens do not fit a context of {cache.ctx_size}", fix="Use a larger --ctx-size"
        )
    cache.release(slot)
    try:
        cache.reserve(slot, length)
        for part in parts(cache, slot, length):
            part.write(read(part.name))
    except BaseException:
        cache.release(slot)
        raise
    cache.host_lengths[slot] = length
    cache.lengths[slot] = length


def depends_on(cache: KVCache) -> dict[str, Any]:
    """Everything that a slot's arrays mean something under, as JSON: two caches that agree in it can exchange them.

    Whatever else comes to lie between a vector and its codes (a fitted map, say) gets its digest here.
    """
    sides = [side for pair in cache.attention.values() for side in pair]
    return {
        "types": [cache.settings.type_k, cache.settings.type_v],
        "windows": list(windows(cache.settings)),
        "dtype": _dtype_name(next((state.conv.dtype for state in cache.recurrent.values()), torch.float32)),
        "layers": [_plain(asdict(shape)) for shape in cache.shapes],
        "codecs": _codecs(sides),
        "rotation": _rotation(sides),
        "means": cache.means_digest,
    }


def _side_parts(cache: KVCache, name: str, side: Side, slot: int, length: int) -> Iterator[Part]:
    heads = side.ring.shape[1]
    sinks, recent = min(length, side.sink), min(length, side.recent)
    if sinks:
        span = torch.arange(sinks, device=cache.device)
        yield _rows(f"{name}.sinks", side.sinks[slot], span)
    if recent:
        span = torch.arange(length - recent, length, device=cache.device) % side.recent
        yield _rows(f"{name}.recent", side.ring[slot], span)
    coded = length - side.sink - side.recent
    if side.codec is None or coded <= 0:
        return
    for plane, stored in zip(side.codec.planes, side.planes, strict=True):
        read = partial(_read_pages, cache, slot, stored, coded)
        write = partial(_write_pages, cache, slot, stored)
        yield Part(f"{name}.{plane.name}", (coded, heads, plane.width), plane.dtype, read, write)


def _rows(name: str, window: torch.Tensor, at: torch.Tensor) -> Part:
    """A window [kv_heads, size, head_dim], of which the rows ``at`` are meant, in this order."""
    heads, _, dim = window.shape

    def write(rows: torch.Tensor) -> None:
        window[:, at] = rows.to(window.device).transpose(0, 1)

    return Part(name, (len(at), heads, dim), window.dtype, lambda: window[:, at].transpose(0, 1), write)


def _read_pages(cache: KVCache, slot: int, stored: torch.Tensor, tokens: int) -> torch.Tensor:
    """[tokens, kv_heads, width] out of pages [pages, kv_heads, PAGE_TOKENS, width]."""
    return stored[cache.pages.owned(slot)].transpose(1, 2).flatten(0, 1)[:tokens]


def _write_pages(cache: KVCache, slot: int, stored: torch.Tensor, rows: torch.Tensor) -> None:
    """The last page was wiped when it was free and stays so behind the sequence."""
    pages = cache.pages.owned(slot)
    whole, rest = divmod(len(rows), PAGE_TOKENS)
    rows = rows.to(stored.device)
    stored[pages[:whole]] = rows[: whole * PAGE_TOKENS].unflatten(0, (whole, PAGE_TOKENS)).transpose(1, 2)
    if rest:
        stored[pages[whole], :, :rest] = rows[whole * PAGE_TOKENS :].transpose(0, 1)


def _recurrent_parts(name: str, state: RecurrentState, slot: int) -> Iterator[Part]:
    for kind, stored in (("conv", state.conv), ("state", state.state)):
        row = stored[slot]
        yield Part(f"{name}.{kind}", tuple(row.shape), row.dtype, row.clone, partial(_copy, row))


def _copy(row: torch.Tensor, new: torch.Tensor) -> None:
    row.copy_(new)


def _codecs(sides: list[Side]) -> dict[str, Any]:
    """Version and planes of each codec in use, by name and head size."""
    codecs = [side.codec for side in sides if side.codec is not None]
    return {
        f"{codec.name}/{codec.head_dim}": {
            "version": codec.version,
            "planes": [[plane.name, _dtype_name(plane.dtype), plane.width] for plane in codec.planes],
        }
        for codec in codecs
    }


def _rotation(sides: list[Side]) -> str | None:
    """The seed of the rotation's signs; imported late, as the plain path never loads the rotation."""
    if not any(side.rotated for side in sides):
        return None
    from turbomoe.kv.hadamard import SIGN_SEED

    return SIGN_SEED


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
