"""PTX that decodes codes two at a time in packed half precision, built from the codecs' own parameters.

A 32-bit register holds two halves. A code masked into the low bits of a half and joined with 0x6400 is the number
1024 + code * 2^position, so one bitwise instruction converts two codes; the level or the trellis value follows by
half-precision FMAs. Shifting a window out of two neighbouring words is one funnel shift.
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


def _masked(w: _Writer, word: str, mask: str, base: str | None = None) -> str:
    """(word & mask) | base, which is 0x6400 in both halves unless given, in one instruction.

    Written out: left alone, the assembler makes two of it, each with a constant inside, and this pipe is half as wide.
    """
    return w.op("lop3.b32", word, w.constant(mask), base or w.constant("0x64006400"), "0xea")


def _shifted(w: _Writer, word: str, right: int) -> str:
    if right == 0:
        return word
    return w.op("shr.b32", word, str(right)) if right > 0 else w.op("shl.b32", word, str(-right))


def _polynomial(w: _Writer, y: str, coefficients: Sequence[float], to: str) -> None:
    """An odd polynomial of y: coefficients of y, y^3, y^5 ..."""
    square = w.op("mul.rn.f16x2", y, y)
    total = w.constant(half2(coefficients[-1]))
    for c in coefficients[-2::-1]:
        total = w.op("fma.rn.f16x2", total, square, w.constant(half2(c)))
    w.op("mul.rn.f16x2", total, y, to=to)


def scalar(bits: int, coefficients: Sequence[float], unit: float) -> Block:
    """Lloyd-Max codes: a word of 4 bytes (and for 3 bits a word of the high plane) to its levels.

    Output r = 2 j + parity holds the values of bits j of bytes parity and parity + 2. ``coefficients`` are those of the
    odd polynomial through the levels, of y = (code - centre) * unit; for 2 bits of the line y and its sign.
    """
    in_byte = 2 if bits == 3 else bits
    per_byte, at = 8 // in_byte, 4 if bits == 4 else 1
    w = _Writer(2 if bits == 3 else 1, 2 * per_byte)
    for parity in (0, 1):
        for j in range(per_byte):
            here = 8 * parity + in_byte * j
            place = at if bits == 4 else at + 2 * j
            low = _shifted(w, w.word(0), here - place)
            mask = ((1 << in_byte) - 1) << place
            x = _masked(w, low, f"0x{mask:04x}{mask:04x}")
            if bits == 3:
                top = _shifted(w, w.word(1), here - place - 2)
                bit = 4 << place
                x = _masked(w, top, f"0x{bit:04x}{bit:04x}", x)
            slope = w.constant(half2(unit * 2.0**-place))
            offset = w.constant(half2(-unit * (1024 * 2.0**-place + ((1 << bits) - 1) / 2)))
            y = w.op("fma.rn.f16x2", x, slope, offset)
            finish = _line_and_sign if bits == 2 else _polynomial
            finish(w, y, coefficients, f"${2 * j + parity}")
    return w.block()


def _line_and_sign(w: _Writer, y: str, coefficients: Sequence[float], to: str) -> None:
    """coefficients[0] * y + coefficients[1] * sign(y): bitwise work, where a polynomial would fill the other pipe."""
    sign = w.op("lop3.b32", y, w.constant("0x80008000"), w.constant(half2(coefficients[1])), "0x6a")
    w.op("fma.rn.f16x2", y, w.constant(half2(coefficients[0])), sign, to=to)


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
