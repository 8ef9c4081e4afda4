"""PTX that decodes codes to pairs of halves, or for keys to four bytes, built from the codecs' own parameters.

A 32-bit register holds two halves. Codes choose bytes in permutations of bytes, four an instruction: scalar codes both
bytes of their levels; trellis windows, through bitwise functions of shifted words, bytes of two or three tables, whose
sum joined with 0x64 is the half 1024 + sum. Shifting bits out of two neighbouring words is one funnel shift.
Each builder returns the text of one inline-assembly block: words of one vector in, registers of values out.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from turbomoe.kv.codebooks import POSITIVE_STEPS
from turbomoe.kv.trellis_codebook import ALL, UNIT, Lookup, Trellis

OF_SIXTEEN = 64  # added to the levels of 4 bits, so that none has a sign


@dataclass(frozen=True)
class Block:
    """Inline assembly: ``inputs`` 32-bit words a group in, ``outputs`` registers of two halves or four bytes out."""

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


class Writer:
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


def _masked(w: Writer, word: str, mask: str, base: str) -> str:
    """(word & mask) | base, in one instruction.

    Written out: left alone, the assembler makes two of it, each with a constant inside, and this pipe is half as wide.
    """
    return w.op("lop3.b32", word, w.constant(mask), base, "0xea")


def _shifted(w: Writer, word: str, right: int) -> str:
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
    w = Writer(words + 2 * each, 4 if bits == 4 else 8)
    low, high = ([w.word(words + side * each + i) for i in (0, each - 1)] for side in (0, 1))
    if bits == 4:
        _sixteen(w, low, high)
    else:
        _up_to_eight(w, bits, low, high)
    return w.block()


def key_bytes(bits: int) -> bytes:
    """What ``scalar_bytes`` looks up: the levels in steps, signed, or of 16 ``OF_SIXTEEN`` more; whole words."""
    steps = [-n for n in reversed(POSITIVE_STEPS[bits])] + list(POSITIVE_STEPS[bits])
    return bytes((n + (OF_SIXTEEN if bits == 4 else 0)) & 0xFF for n in steps)


def scalar_bytes(bits: int) -> Block:
    """Codes to signed bytes, four a register. In: as ``scalar``, but ``key_bytes``.

    Sixteen levels are two tables of eight. A nibble whose highest bit is set asks for copies of the sign of a byte,
    which are zeros here, so each table answers for its own half and what they say is joined.
    """
    words, table = (2 if bits == 3 else 1), max(1, (1 << bits) // 4)
    w = Writer(words + table, 2 if bits == 4 else 4)
    tables = [w.word(words + i) for i in range(table)]
    if bits == 4:
        other = w.op("xor.b32", w.word(0), w.constant("0x88888888"))
        for half in (0, 1):
            below = w.op("prmt.b32", *tables[:2], _shifted(w, w.word(0), 16 * half))
            above = w.op("prmt.b32", *tables[2:], _shifted(w, other, 16 * half))
            w.op("or.b32", below, above, to=f"${half}")
        return w.block()
    for j in (0, 1):
        chosen = _nibbles(w, bits, j)
        for half in (0, 1):
            w.op("prmt.b32", tables[0], tables[-1], _shifted(w, chosen, 16 * half), to=f"${2 * j + half}")
    return w.block()


def _nibbles(w: Writer, bits: int, j: int) -> str:
    """In nibble n the code of 2 or 3 bits at bits 2 j or 2 j + 4 of byte n // 2."""
    chosen = w.op("and.b32", _shifted(w, w.word(0), 2 * j), w.constant("0x33333333"))
    if bits == 3:
        chosen = _masked(w, _shifted(w, w.word(1), 2 * j - 2), "0x44444444", chosen)
    return chosen


def _bytes_of(w: Writer, low: list[str], high: list[str], chosen: str) -> tuple[str, str]:
    """The low and the high bytes of the levels that the lowest four nibbles choose."""
    return w.op("prmt.b32", *low, chosen), w.op("prmt.b32", *high, chosen)


def _up_to_eight(w: Writer, bits: int, low: list[str], high: list[str]) -> None:
    """Half of the nibbles serve two bytes."""
    for j in (0, 1):
        chosen = _nibbles(w, bits, j)
        for half in (0, 1):
            found = _bytes_of(w, low, high, _shifted(w, chosen, 16 * half))
            for k in (0, 1):
                w.op("prmt.b32", *found, _BYTES[k], to=f"${2 * (j + 2 * k) + half}")


def _sixteen(w: Writer, low: list[str], high: list[str]) -> None:
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


def level_tables(trellis: Trellis) -> bytes:
    """What ``trellis`` looks up, 8 bytes each: the levels of a table, counted from its lowest."""
    return b"".join(bytes(level - min(lookup.levels) for level in lookup.levels) for lookup in trellis.lookups)


def lowest(trellis: Trellis) -> int:
    """The sum that the bytes of ``level_tables`` are counted from."""
    return sum(min(lookup.levels) for lookup in trellis.lookups)


def trellis(trellis: Trellis, as_bytes: bool = False) -> Block:
    """Trellis codes to values, a pair a register. In: a group of words, the word after it, ``level_tables``.

    Three bits in each nibble choose eight values at a time: four a permutation. Bytes of tables are added as they are,
    none carries; joined with 0x64 they are the halves 1024 + byte. ``as_bytes``: four a register, signed, so that a
    value is (byte + 128 + ``lowest``) * ``UNIT``.
    """
    words, size = trellis.group_words, len(level_tables(trellis)) // 4
    batches = 4 * words // trellis.step_bits
    w = Writer(words + 1 + size, (2 if as_bytes else 4) * batches)
    tables = [[w.word(words + 1 + i), w.word(words + 2 + i)] for i in range(0, size, 2)]
    stream = _Stream(w, trellis)
    for batch in range(batches):
        chosen = [_chosen(w, stream, batch, lookup) for lookup in trellis.lookups]
        for half in (0, 1):
            here = [_shifted(w, index, 16 * half) for index in chosen]
            found = [w.op("prmt.b32", *table, index) for table, index in zip(tables, here, strict=True)]
            total = functools.reduce(lambda a, b: w.op("add.u32", a, b), found)
            if as_bytes:
                w.op("xor.b32", total, w.constant("0x80808080"), to=f"${2 * batch + half}")
            else:
                _to_halves(w, total, lowest(trellis), 4 * batch + 2 * half)
    return w.block()


def _to_halves(w: Writer, total: str, lowest: int, register: int) -> None:
    """Four bytes to two registers of values."""
    unit, shift = w.constant(half2(UNIT)), w.constant(half2((lowest - 1024) * UNIT))
    for k, bytes_ in enumerate(("0x4140", "0x4342")):
        number = w.op("prmt.b32", total, w.constant("0x64646464"), bytes_)
        w.op("fma.rn.f16x2", number, unit, shift, to=f"${register + k}")


class _Stream:
    """The bits of a group of words with steps ``field`` bits apart, 32 at a time from any place on."""

    def __init__(self, w: Writer, trellis: Trellis) -> None:
        self._w, self._trellis = w, trellis
        self._known: dict[int, str] = {}

    def batch(self, batch: int, tap: int) -> str:
        """What the lookups of this batch see through a tap."""
        first, turn = divmod(batch, self._trellis.turns)
        right = turn * self._trellis.field + tap
        place = 32 * first + right
        if place not in self._known:
            if right <= 0:  # no lookup sees what is left of a step
                self._known[place] = _shifted(self._w, self._word(first), right)
            else:
                pair = self._word(first), self._word(first + 1)
                self._known[place] = self._w.op("shf.r.wrap.b32", *pair, str(right))
        return self._known[place]

    def _word(self, index: int) -> str:
        trellis, w = self._trellis, self._w
        if trellis.field == trellis.step_bits:
            return w.word(index)
        if 32 * index not in self._known:
            steps = 32 // trellis.field
            word, right = divmod(steps * trellis.step_bits * index, 32)
            x = w.word(word)
            if right:
                x = w.op("shf.r.wrap.b32", x, w.word(word + 1), str(right))
            self._known[32 * index] = self._moved_apart(x, steps)
        return self._known[32 * index]

    def _moved_apart(self, x: str, steps: int) -> str:
        """The lowest ``steps`` steps of x: runs are halved, and the upper half of each moves left."""
        w, step, field = self._w, self._trellis.step_bits, self._trellis.field
        x = w.op("and.b32", x, w.constant(f"0x{(1 << steps * step) - 1:08x}"))
        run = steps // 2
        while run:
            one = ((1 << run * step) - 1) << run * step
            mask = sum(one << 2 * run * field * i for i in range(steps // (2 * run)))
            upper = w.op("and.b32", x, w.constant(f"0x{mask:08x}"))
            x = w.op("mad.lo.u32", upper, str((1 << run * (field - step)) - 1), x)
            run //= 2
        return x


def _chosen(w: Writer, stream: _Stream, batch: int, lookup: Lookup) -> str:
    """Three bits in each nibble."""
    everywhere = [stream.batch(batch, shift) for shift, mask in lookup.taps if mask == ALL]
    if lookup.function is not None or len(everywhere) > 2:
        table = 0x96 if lookup.function is None else lookup.function
        everywhere = [w.op("lop3.b32", *everywhere[:3], f"0x{table:02x}"), *everywhere[3:]]
    all_bits = w.constant(_everywhere(ALL))
    if len(everywhere) == 1:
        found = w.op("and.b32", *everywhere, all_bits)
    else:
        found = w.op("lop3.b32", *everywhere, all_bits, "0x28")  # (a ^ b) & c
    for shift, mask in lookup.taps:
        if mask != ALL:
            seen, bits = stream.batch(batch, shift), w.constant(_everywhere(mask))
            found = w.op("lop3.b32", found, seen, bits, "0x78")  # a ^ (b & c)
    return found


def _everywhere(byte: int) -> str:
    return f"0x{byte * 0x01010101:08x}"
