"""Runs the inline assembly of ``kv/kernels/assembly.py`` on arrays: the few instructions that it uses."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

from turbomoe.kv.kernels.assembly import Block

Words = npt.NDArray[np.uint32]


def run(block: Block, inputs: list[Words]) -> list[Words]:
    """The outputs of the block, by register, for arrays of input words."""
    assert len(inputs) == block.inputs
    registers = {f"${block.outputs + i}": word.astype(np.uint32) for i, word in enumerate(inputs)}
    for line in re.findall(r"^([a-z][^;{}]*);", block.text, re.MULTILINE):
        name, arguments = line.split(" ", 1)
        target, *sources = arguments.split(", ")
        values = [registers[s] if s in registers else np.uint32(int(s, 0) & 0xFFFFFFFF) for s in sources]
        registers[target] = np.broadcast_to(_OPERATIONS[name](*values), inputs[0].shape).astype(np.uint32)
    return [registers[f"${i}"] for i in range(block.outputs)]


def _lop3(a: Words, b: Words, c: Words, table: np.uint32) -> Words:
    """Bit n of the table is the result where bits of a, b, c make the number n."""
    found = np.zeros_like(a)
    for n in range(8):
        if int(table) >> n & 1:
            found |= (a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c)
    return found


def _prmt(a: Words, b: Words, chosen: Words) -> Words:
    """A nibble names one of eight bytes; its highest bit asks for eight copies of that byte's sign."""
    pool = a.astype(np.uint64) | b.astype(np.uint64) << 32
    found: npt.NDArray[np.uint64] = np.zeros_like(pool)
    for i in range(4):
        nibble = chosen.astype(np.uint64) >> 4 * i & 15
        byte = pool >> (nibble & 7) * 8 & 255
        signs = (byte >> 7) * 255
        found = found | np.where(nibble & 8, signs, byte) << 8 * i
    return found.astype(np.uint32)


def _funnel(low: Words, high: Words, right: np.uint32) -> Words:
    return ((low.astype(np.uint64) | high.astype(np.uint64) << 32) >> (int(right) & 31)).astype(np.uint32)


def halves(x: Words) -> npt.NDArray[np.float64]:
    """The two halves of each word, the low one first: [..., 2]."""
    both = np.stack([x & 0xFFFF, x >> 16], -1).astype(np.uint16)
    return both.view(np.float16).astype(np.float64)


def bytes_of(x: Words) -> npt.NDArray[np.float64]:
    """The four signed bytes of each word, the lowest first: [..., 4]."""
    return np.stack([x >> 8 * i & 0xFF for i in range(4)], -1).astype(np.uint8).view(np.int8).astype(np.float64)


def _rounded(x: npt.NDArray[np.float64]) -> Words:
    """Float64 holds sums and products of a few halves exactly, so they are rounded once."""
    bits = x.astype(np.float16).view(np.uint16).astype(np.uint32)
    found: Words = bits[..., 0] | bits[..., 1] << 16
    return found


_OPERATIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "or.b32": lambda a, b: a | b,
    "shr.b32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: a << b,
    "sub.s32": lambda a, b: a - b,
    "add.u32": lambda a, b: a + b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "shf.r.wrap.b32": _funnel,
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
    "mul.rn.f16x2": lambda a, b: _rounded(halves(a) * halves(b)),
    "sub.rn.f16x2": lambda a, b: _rounded(halves(a) - halves(b)),
    "fma.rn.f16x2": lambda a, b, c: _rounded(halves(a) * halves(b) + halves(c)),
}
