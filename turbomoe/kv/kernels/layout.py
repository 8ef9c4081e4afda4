"""How the decoding kernels lay a vector out: which codes share a register, and which dim stands in which column.

Read with ``assembly.py`` and ``plane_assembly.py``, which decode a group of words, and ``codes.py``, which moves the
registers into a tile.
"""

from __future__ import annotations

import functools

import torch

from turbomoe.kv.codebooks import STEPS, levels
from turbomoe.kv.kernels import assembly, plane_assembly
from turbomoe.kv.trellis_codebook import TRELLISES, UNIT, Trellis, codebook

SCALAR_BITS = {"tq2": 2, "tq3": 3, "tq4": 4}


def value_pairs(trellis: Trellis) -> list[tuple[int, int]]:
    """The values of a group of words that share a register: neighbours in a batch of eight, or as planes have them."""
    if trellis.magnitudes is not None:
        return plane_assembly.pairs(trellis)
    steps, turns = 32 * trellis.group_words // trellis.step_bits, trellis.turns
    batches = [range(first + turn, first + 8 * turns, turns) for first in range(0, steps, 8 * turns)
               for turn in range(turns)]  # fmt: skip
    return [(batch[i], batch[i + 1]) for batch in batches for i in range(0, 8, 2)]


def block(name: str, for_scores: bool = False) -> assembly.Block:
    """The assembly that decodes a group of words of this codec: to pairs of halves, or four bytes (``in_bytes``)."""
    if name in SCALAR_BITS:
        return (assembly.scalar_bytes if for_scores else assembly.scalar)(SCALAR_BITS[name])
    trellis = TRELLISES[name]
    return (assembly.trellis if trellis.magnitudes is None else plane_assembly.planes)(trellis, as_bytes=for_scores)


def in_bytes(name: str) -> bool:
    """Whether keys are decoded to signed bytes, whose products with queries of two bytes are integers, and exact.

    It saves turning bytes into halves, and half the products.
    """
    return name in TRELLISES or name in SCALAR_BITS


def byte_offset(name: str) -> int:
    """What is added to twice a byte of such keys, to be a value in half of ``byte_unit``."""
    if name in SCALAR_BITS:
        return -2 * assembly.OF_SIXTEEN if name == "tq4" else 0
    trellis = TRELLISES[name]
    return 1 if trellis.magnitudes is not None else 2 * (128 + assembly.lowest(trellis))


def byte_unit(name: str) -> float:
    return STEPS[SCALAR_BITS[name]] if name in SCALAR_BITS else UNIT


def _group_dims(name: str, head_dim: int, as_bytes: bool) -> torch.Tensor:
    """int64 [registers, 2], or 4 where they are bytes: the dims of the first group, by register and lane."""
    if name in TRELLISES:
        dims = torch.tensor(value_pairs(TRELLISES[name]))
        return dims.view(-1, 4) if as_bytes else dims
    if as_bytes:  # nibbles of a word, of which two codes of 2 bits share one
        nibble, slots = torch.arange(8).view(2, 4), 1 if name == "tq4" else 2
        slot = nibble % 2 * slots + torch.arange(slots)[:, None, None]
        return (slot * (head_dim // (2 * slots)) + nibble // 2).flatten(0, 1)
    # Register 2 j + i holds codes j of two bytes: i and i + 2 of four bits, else 2 i and 2 i + 1.
    runs = 2 if name == "tq4" else 4
    register = torch.arange(2 * runs)[:, None]
    bytes_ = register % 2 + torch.tensor([0, 2]) if name == "tq4" else register % 2 * 2 + torch.tensor([0, 1])
    return register // 2 * (head_dim // runs) + bytes_


def chunks(head_dim: int, *names: str) -> int:
    """In how many parts a vector is decoded, one after the other: halves of a long one take half the registers.

    Codes of up to three bits do without, and are faster so. With groups of five words a half would have two of them,
    too few for four threads.
    """
    light = all(name in {"tq2", "tq3", "tcq2", "tcq3"} for name in names)
    return 1 if light or "tcq2.5" in names else max(1, head_dim // 128)


@functools.lru_cache(maxsize=64)
def column_dims(
    name: str, head_dim: int, for_scores: bool, parts: int, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Which dim stands in each column of ``codes.vectors``, and the column of each dim: int32 [head_dim] both.

    A column counts, from its lowest digit: for scores lane (two of a register, or four where they are bytes), thread,
    register of the thread; for sums lane, register in a run of up to 8, thread, run; then the chunk, of ``parts``.
    """
    if name not in SCALAR_BITS and name not in TRELLISES:
        natural = torch.arange(head_dim, dtype=torch.int32, device=device)
        return natural, natural
    dims = _group_dims(name, head_dim, for_scores)
    registers, groups = len(dims), head_dim // dims.numel()
    groups //= parts
    own = max(1, min(4, groups // 4))
    threads, each = groups // own, own * registers
    if for_scores:
        chunk, register, thread, lane = _digits(parts, each, threads, dims.shape[1])
    else:
        chunk, run, thread, inside, lane = _digits(parts, -(-each // 8), threads, min(8, each), 2)
        register = run * min(8, each) + inside
    group = chunk * groups + thread * own + register // registers
    step = dims.numel() if name in TRELLISES else 4
    found = (dims[register % registers, lane] + group * step).int()
    return found.to(device), found.argsort().int().to(device)


def _digits(*shape: int) -> list[torch.Tensor]:
    """The digits of 0, 1, 2 ... in this mixed radix, the highest first."""
    return [digit.flatten() for digit in torch.meshgrid(*map(torch.arange, shape), indexing="ij")]


@functools.lru_cache(maxsize=64)
def table(name: str, for_scores: bool = False, device: str = "cpu") -> torch.Tensor:
    """float16: levels, then the bits of what the assembly looks up, four words or more; else one zero.

    Levels are a trellis codebook, by value and window, or those of a scalar codec, by code.
    """
    if name in TRELLISES:
        trellis = TRELLISES[name]
        in_planes = trellis.magnitudes is not None
        known = codebook(trellis).flatten().half()
        bytes_ = (plane_assembly if in_planes else assembly).level_tables(trellis)
    elif name in SCALAR_BITS:
        found = levels(SCALAR_BITS[name])
        known, bytes_ = torch.tensor(found, dtype=torch.float16), assembly.byte_tables(found)
        if for_scores:
            bytes_ = (assembly.key_bytes(SCALAR_BITS[name]) * 4)[:16]
    else:
        return torch.zeros(1, dtype=torch.float16, device=device)
    return torch.cat([known, torch.frombuffer(bytearray(bytes_), dtype=torch.float16)]).to(device)
