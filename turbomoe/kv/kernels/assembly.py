"""PTX that decodes codes to pairs of halves, built from the codecs' own parameters.

A 32-bit register holds two halves. Scalar codes choose bytes of their levels in permutations of bytes, four codes an
instruction. A trellis window masked into the low bits of a half and joined with 0x6400 is the number 1024 + window, so
one bitwise instruction converts two, and their values follow by half-precision FMAs. Shifting a window out of two
neighbouring words is one funnel shift.
Each builder returns the text of one inline-assembly block: words of one vector in, registers of two values each out.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from turbomoe.kv.trellis_codebook import Trellis


@dataclass(frozen=True)
class Block:
    """Inline assembly: ``inputs`` 32-bit words a group in, ``outputs`` registers of two halves out."""

    text: str
    inputs: int
    outputs: int

    @property
    def parts(self) -> tuple[str, str]:
        """The text and the constraints, as ``inline_asm_elementwise`` takes them."""
        return self.text, ",".join(["=&r"] * self.outputs + ["r"] * self.inputs)


def half2(value: float) -> str:
    """The number twice, as an immediate operand; it must be a half."""
    bits = struct.unpack("<H", struct.pack("<e", value))[0]
    return f"0x{bits:04x}{bits:04x}"


def both(low: float, high: float) -> str:
    """Two numbers, one a lane."""
    bits = [struct.unpack("<H", struct.pack("<e", v))[0] for v in (low, high)]
    return f"0x{bits[1]:04x}{bits[0]:04x}"


class _Writer:
    """Lines of PTX with scratch registers named on demand."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.inputs, self.outputs = inputs, outputs
        self._lines: list[str] = []
        self._scratch = 0
        self._constants: dict[str, str] = {}

    def new(self) -> str:
        self._scratch += 1
        return f"t{self._scratch}"

    def word(self, index: int) -> str:
        return f"${self.outputs + index}"

    def constant(self, immediate: str) -> str:
        """A register that holds ``immediate``: half-precision instructions take none directly."""
        if immediate not in self._constants:
            self._constants[immediate] = self.new()
        return self._constants[immediate]

    def op(self, name: str, *args: str, to: str | None = None) -> str:
        target = to or self.new()
        self._lines.append(f"{name} {', '.join((target, *args))};")
        return target

    def block(self) -> Block:
        registers = f".reg .b32 t<{self._scratch + 1}>;"
        constants = [f"mov.b32 {register}, {value};" for value, register in self._constants.items()]
        return Block("{\n" + "\n".join([registers, *constants, *self._lines]) + "\n}", self.inputs, self.outputs)


def _masked(w: _Writer, word: str, mask: str, base: str) -> str:
    """(word & mask) | base, in one instruction.

    Written out: left alone, the assembler makes two of it, each with a constant inside, and this pipe is half as wide.
    """
    return w.op("lop3.b32", word, w.constant(mask), base, "0xea")


def _shifted(w: _Writer, word: str, right: int) -> str:
    if right == 0:
        return word
    return w.op("shr.b32", word, str(right)) if right > 0 else w.op("shl.b32", word, str(-right))


def byte_tables(levels: Sequence[float]) -> bytes:
    """What ``scalar`` looks up for these levels (of 16, the positive ones): their low bytes, then their high bytes.

    Two words each, four levels filled up by themselves. The kernel holds them in registers; as constants of the text
    they would be copied to one before each use.
    """
    halves = [struct.pack("<e", level) for level in levels[8 if len(levels) == 16 else 0 :]]
    return b"".join(bytes(half[byte] for half in halves) * (8 // len(halves)) for byte in (0, 1))


def scalar(bits: int) -> Block:
    """Lloyd-Max codes to levels, a pair a register. In: a word of 4 bytes, for 3 bits one of the high plane,
    ``byte_tables`` (for 2 bits the first word of each half).

    ``layout.column_dims`` says which codes share one. A byte permutation looks up four bytes at a time among eight,
    chosen by four nibbles: so codes are spread to nibbles, and the two bytes of a level come from two tables. The
    sixteen levels of 4 bits are eight and a sign.
    """
    words = 2 if bits == 3 else 1
    each = 1 if bits == 2 else 2
    w = _Writer(words + 2 * each, 4 if bits == 4 else 8)
    low, high = ([w.word(words + side * each + i) for i in (0, each - 1)] for side in (0, 1))
    if bits == 4:
        _sixteen(w, low, high)
    else:
        _up_to_eight(w, bits, low, high)
    return w.block()


def _bytes_of(w: _Writer, low: list[str], high: list[str], chosen: str) -> tuple[str, str]:
    """The low and the high bytes of the levels that the lowest four nibbles choose."""
    return w.op("prmt.b32", *low, chosen), w.op("prmt.b32", *high, chosen)


def _up_to_eight(w: _Writer, bits: int, low: list[str], high: list[str]) -> None:
    """Nibble n of ``chosen`` is the code at bits j or j + 2 of byte n // 2, so half of it serves two bytes."""
    for j in (0, 1):
        chosen = w.op("and.b32", _shifted(w, w.word(0), 2 * j), w.constant("0x33333333"))
        if bits == 3:
            chosen = _masked(w, _shifted(w, w.word(1), 2 * j - 2), "0x44444444", chosen)
        for half in (0, 1):
            found = _bytes_of(w, low, high, _shifted(w, chosen, 16 * half))
            for k in (0, 1):
                w.op("prmt.b32", *found, _BYTES[k], to=f"${2 * (j + 2 * k) + half}")


def _sixteen(w: _Writer, low: list[str], high: list[str]) -> None:
    """A code's place among the positive levels is code - 8, or 7 - code if it is less than 8."""
    word = w.word(0)
    top = w.op("and.b32", word, w.constant("0x88888888"))
    flips = w.op("sub.s32", top, _shifted(w, top, 3))
    chosen = w.op("lop3.b32", word, flips, w.constant("0x77777777"), "0x82")  # ~(word ^ flips) & 0x77777777
    for parity in (0, 1):
        here = w.op("prmt.b32", chosen, chosen, "0x0020" if parity == 0 else "0x0031")
        found = _bytes_of(w, low, high, here)
        for j in (0, 1):
            level = w.op("prmt.b32", *found, _BYTES[j])
            sign = _shifted(w, word, 8 * parity + 4 * j - 12)
            # level | (~sign & 0x80008000)
            w.op("lop3.b32", level, sign, w.constant("0x80008000"), "0xf2", to=f"${2 * j + parity}")


_BYTES = ("0x6240", "0x7351")  # of low and high bytes the first and third, or the second and fourth, as two halves


def _window(w: _Writer, words: int, first: int) -> str:
    """The 32 bits from bit ``first`` of the group on; negative: from before its start, filled with zeros."""
    if first < 0:
        return w.op("shl.b32", w.word(0), str(-first))
    index, shift = divmod(first, 32)
    if shift == 0:
        return w.word(index)
    return w.op("shf.r.wrap.b32", w.word(index), w.word(min(index + 1, words)), str(shift))


def _lanes(w: _Writer, words: int, low: int, high: int, mask: int, base: str) -> str:
    """Windows that begin at bits ``low`` and ``high``, one in each half, joined with ``base``."""
    if high - low == 16:
        return _masked(w, _window(w, words, low), f"0x{mask:04x}{mask:04x}", base)
    x = _masked(w, _window(w, words, low), f"0x{mask:08x}", base)
    if high == low:
        return w.op("prmt.b32", x, x, "0x1010")
    return _masked(w, _window(w, words, high - 16), f"0x{mask:04x}0000", x)


def _hash(w: _Writer, words: int, steps: tuple[int, int], trellis: Trellis) -> str:
    """u of two windows: (multiplier * window) modulo 2^window_bits, scaled into [-1, 1)."""
    half, mask = 1 << trellis.window_bits - 1, trellis.states - 1
    first, second = (step * trellis.step_bits for step in steps)
    magic = w.constant("0x64006400")
    a = (trellis.multipliers[0], trellis.multipliers[-1])
    if trellis.values == 1 and a[0] * mask < 1 << 16:
        # Both products fit their halves, and one integer multiplication makes them.
        x = w.op("mul.lo.u32", _lanes(w, words, first, second, mask, w.constant("0")), str(a[0]))
        h = _masked(w, x, f"0x{mask:04x}{mask:04x}", magic)
        return w.op("fma.rn.f16x2", h, w.constant(half2(1 / half)), w.constant(half2(-1024 / half - 1)))
    # Else halves do: t, from 2048 on, rounds to even numbers, so it is twice the product's whole part and something.
    h = _lanes(w, words, first, second, mask, magic)
    multiplier = w.constant(both(*(v / half for v in a)))
    shift = w.constant(both(*(2051 + v - (1024 + half) * v // half for v in a)))
    s = w.op("sub.rn.f16x2", shift, w.op("fma.rn.f16x2", h, multiplier, shift))
    return w.op("fma.rn.f16x2", h, multiplier, s)


def trellis(trellis: Trellis, pairs: Sequence[tuple[int, int]]) -> Block:
    """Trellis codes: a group of words and the one after it to the values of ``pairs`` of steps, a pair a register.

    With two values a step a pair names the same step twice. The arithmetic is that of ``trellis_codebook``, operation
    by operation, so that both agree bit for bit.
    """
    words, exponents, c = trellis.group_words, trellis.exponents, trellis.coefficients
    w = _Writer(words + 1, len(pairs))
    for out, steps in enumerate(pairs):
        u = _hash(w, words, steps, trellis)
        powers, e = {1: u}, 1
        while e < exponents[-1] - 1:
            powers[2 * e] = w.op("mul.rn.f16x2", powers[e], powers[e])
            e *= 2
        total = w.constant(both(c[0][0], c[-1][0]))
        for k in range(len(exponents) - 1, 0, -1):
            total = w.op("fma.rn.f16x2", powers[exponents[k] - 1], w.constant(both(c[0][k], c[-1][k])), total)
        w.op("mul.rn.f16x2", total, u, to=f"${out}")
    return w.block()
