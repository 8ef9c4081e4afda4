"""PTX that decodes a trellis whose bits lie in planes (``trellis_codebook.Magnitudes``).

Bit i of a word belongs to step i of a group of 32. Each of the bits that choose a level is an exclusive or of such
words, and serves 32 steps; what follows brings the three bits of a magnitude together in nibbles, four steps apart, and
the sign to the top of bytes. Four magnitudes are found at a time: the two bytes of halves, or bytes that are the value.
"""

from __future__ import annotations

import functools

from turbomoe.kv.kernels.assembly import Block, Writer, byte_tables
from turbomoe.kv.trellis_codebook import UNIT, Magnitudes, Trellis

EVEN = "0x55555555"  # bits; the others are odd
LOWER = "0x33333333"  # two bits of a nibble
TOPS = "0x80808080"  # of bytes
XOR, AND, CHOOSE = "0x96", "0x80", "0xca"  # truth tables for lop3: a ^ b ^ c; a & b & c; a ? b : c


def pairs(trellis: Trellis) -> list[tuple[int, int]]:
    """The values of a group that share a register, the lower one first."""
    registers = [(v, j + 16 * half + 8 * k) for v in range(trellis.values) for j in range(4) for half in (0, 1)
                 for k in (0, 1)]  # fmt: skip
    return [(trellis.values * step + v, trellis.values * (step + 4) + v) for v, step in registers]


def level_tables(trellis: Trellis) -> bytes:
    """What ``planes`` looks up, 8 bytes each: the low bytes of halves, the high ones, signed bytes."""
    assert trellis.magnitudes is not None
    levels = trellis.magnitudes.levels
    return byte_tables([level * UNIT / 2 for level in levels]) + bytes(level // 2 for level in levels)


def planes(trellis: Trellis, as_bytes: bool = False) -> Block:
    """Codes to values, a pair a register. In: the words of a group, those of the group after it, the first two of
    ``level_tables``.

    ``as_bytes``: four a register, two neighbouring pairs, by the third table; a value is (2 * byte + 1) * ``UNIT`` / 2.
    """
    assert trellis.magnitudes is not None and trellis.window_bits <= 2 * trellis.step_bits
    words = trellis.step_bits
    w = Writer(2 * words + (2 if as_bytes else 4), 8 * trellis.values * (1 if as_bytes else 2))
    own, following = [w.word(i) for i in range(words)], [w.word(words + i) for i in range(words)]
    window = own + [w.op("shf.r.wrap.b32", a, b, "1") for a, b in zip(own, following, strict=True)]
    tables = [[w.word(2 * words + i), w.word(2 * words + i + 1)] for i in ((0,) if as_bytes else (0, 2))]
    for value in range(trellis.values):
        *bits, sign = _index(w, window, trellis.magnitudes, value)
        signs = [_to_bytes(w, sign, half) for half in (0, 1)]
        for j, chosen in enumerate(_nibbles(w, *bits)):
            for half in (0, 1):
                here = w.op("shr.b32", chosen, "16") if half else chosen
                top = w.op("shl.b32", signs[half], str(3 - j)) if j < 3 else signs[half]
                register = 8 * value + 2 * j + half
                found = [w.op("prmt.b32", *table, here) for table in tables]
                if as_bytes:
                    _to_signed(w, found[0], top, register)
                else:
                    _to_halves(w, found[0], found[1], top, 2 * register)
    return w.block()


def _to_halves(w: Writer, low: str, high: str, top: str, register: int) -> None:
    """Two registers of values, from the bytes of four magnitudes, and signs at the top of bytes."""
    high = w.op("lop3.b32", top, w.constant(TOPS), high, "0xea")  # (a & b) | c
    for k, bytes_ in enumerate(("0x5140", "0x7362")):
        w.op("prmt.b32", low, high, bytes_, to=f"${register + k}")


def _to_signed(w: Writer, magnitudes: str, top: str, register: int) -> None:
    """The complement of those bytes whose sign is set: prmt makes eight of a byte's top."""
    w.op("xor.b32", magnitudes, w.op("prmt.b32", top, top, "0xba98"), to=f"${register}")


def _index(w: Writer, window: list[str], magnitudes: Magnitudes, value: int) -> tuple[str, str, str, str]:
    """The three bits of the magnitude's number, the lowest first, and the sign."""
    sign, a, b, *deeper = (_parity(w, window, mask) for mask in magnitudes.masks[value])
    outer = w.op("lop3.b32", a, b, deeper[0], AND)
    return w.op("lop3.b32", outer, deeper[2], b, CHOOSE), w.op("lop3.b32", outer, deeper[1], a, CHOOSE), outer, sign


def _parity(w: Writer, window: list[str], mask: int) -> str:
    """The exclusive or of the masked bits of the window."""
    found, *more = (word for place, word in enumerate(window) if mask >> place & 1)
    while len(more) > 1:
        found, more = w.op("lop3.b32", found, *more[:2], XOR), more[2:]
    return functools.reduce(lambda x, y: w.op("xor.b32", x, y), more, found)


def _nibbles(w: Writer, a: str, b: str, c: str) -> list[str]:
    """Four words: nibble n of word j holds the bits of a, b and c at place 4 n + j, and a zero."""
    even, lower = w.constant(EVEN), w.constant(LOWER)
    ab = [
        w.op("lop3.b32", even, a, w.op("shl.b32", b, "1"), CHOOSE),  # b's bits next to a's: even places
        w.op("lop3.b32", even, w.op("shr.b32", a, "1"), b, CHOOSE),  # odd places
    ]
    # Every other bit of c is cleared: it would stand beside the others, and ask prmt for signs.
    c0, c1 = w.op("and.b32", c, even), w.op("lop3.b32", even, c, c, "0x0c")
    c_ = [w.op("shl.b32", c0, "2"), w.op("shl.b32", c1, "1"), c0, w.op("shr.b32", c1, "1")]
    ab += [w.op("shr.b32", word, "2") for word in ab]
    return [w.op("lop3.b32", lower, *both, CHOOSE) for both in zip(ab, c_, strict=True)]


def _to_bytes(w: Writer, x: str, half: int) -> str:
    """The upper four bits of byte n: bits 4 n to 4 n + 3 of that half of x."""
    spread = w.op("prmt.b32", x, x, "0x3322" if half else "0x1100")
    return w.op("lop3.b32", w.constant("0x00ff00ff"), w.op("shl.b32", spread, "4"), spread, CHOOSE)
