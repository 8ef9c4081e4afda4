"""The packed layout "planar group-32": which planes a matrix has and where they lie (``docs/packed-layout.md``).

The same rules as ``src/formats.h`` and ``src/formats.c``; a test holds the two together. A packed matrix is one run
of bytes, 64-byte aligned, read as it is by the CPU core, by the link and by a GPU kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from turbomoe.errors import ModelError

GROUP = 32  # values that share a scale
SUPER = 256  # values that share the fp16 factors of two-level scales
STEP = 512  # values a kernel may read at a time: what a row may be read beyond its end
ALIGN = 64

Scale = Literal["none", "f16", "e8m0", "two", "half"]
Min = Literal["none", "f16", "two"]


@dataclass(frozen=True)
class PackedFormat:
    """Constant facts of a format; the name is that of the GGUF block format it is packed from, without loss.

    ``zero`` is the code that means 0. ``table`` holds the 16 values that codes index. Scales: ``f16`` and ``e8m0``
    one per 32 values; ``two`` an unsigned byte per 32 times an fp16 per 256; ``half`` a signed byte per 16 times that.
    """

    name: str
    index: int  # the C core's number
    block: int
    block_bytes: int
    code_bits: int
    high_bits: int = 0
    scale: Scale = "none"
    min: Min = "none"
    zero: int = 0
    table: tuple[int, ...] = ()

    @property
    def is_float(self) -> bool:
        return self.code_bits >= 16

    @property
    def bits_per_value(self) -> float:
        """Bits stored per value of a wide matrix, scales included, padding not."""
        row = sum(_row_bytes(self, STEP).values())
        return 8 * row / STEP


_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_MXFP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)

FORMATS = {
    f.name: f
    for f in (
        PackedFormat("Q4_0", 0, 32, 18, 4, scale="f16", zero=8),
        PackedFormat("Q4_1", 1, 32, 20, 4, scale="f16", min="f16"),
        PackedFormat("Q5_0", 2, 32, 22, 4, 1, scale="f16", zero=16),
        PackedFormat("Q5_1", 3, 32, 24, 4, 1, scale="f16", min="f16"),
        PackedFormat("Q8_0", 4, 32, 34, 8, scale="f16"),
        PackedFormat("IQ4_NL", 5, 32, 18, 4, scale="f16", table=_IQ4_NL),
        PackedFormat("MXFP4", 6, 32, 17, 4, scale="e8m0", table=_MXFP4),
        PackedFormat("Q4_K", 7, 256, 144, 4, scale="two", min="two"),
        PackedFormat("Q5_K", 8, 256, 176, 4, 1, scale="two", min="two"),
        PackedFormat("Q6_K", 9, 256, 210, 4, 2, scale="half", zero=32),
        PackedFormat("F16", 10, 1, 2, 16),
        PackedFormat("BF16", 11, 1, 2, 16),
        PackedFormat("F32", 12, 1, 4, 32),
    )
}


@dataclass(frozen=True)
class PackedPlane:
    """One plane: ``rows`` rows of ``row_bytes`` without gaps, from byte ``offset``; ``nbytes`` with its padding."""

    offset: int
    row_bytes: int
    nbytes: int


@dataclass(frozen=True)
class PackedLayout:
    """Where the planes of one packed matrix [rows, cols] lie. ``nbytes`` is a multiple of 64."""

    format: PackedFormat
    rows: int
    cols: int
    planes: dict[str, PackedPlane]
    nbytes: int

    @property
    def raw_bytes(self) -> int:
        """Bytes of the same matrix in GGUF blocks."""
        return self.rows * self.cols // self.format.block * self.format.block_bytes

    @property
    def growth(self) -> float:
        """Packed bytes over GGUF bytes, padding included: 1.0 is no growth."""
        return self.nbytes / self.raw_bytes


def _row_bytes(f: PackedFormat, cols: int) -> dict[str, int]:
    groups, supers = cols // GROUP, cols // SUPER
    scale = {"none": 0, "f16": 2, "e8m0": 1, "two": 1, "half": 2}[f.scale]
    return {
        "codes": cols * f.code_bits // 8,
        "high": 32 * f.high_bits * -(-cols // SUPER),
        "scales": groups * scale,
        "mins": groups * {"none": 0, "f16": 2, "two": 1}[f.min],
        "supers": supers * {"two": 4, "half": 2}.get(f.scale, 0),
    }


def _round_up(n: int) -> int:
    return -(-n // ALIGN) * ALIGN


def packed_layout(format: str, rows: int, cols: int) -> PackedLayout:
    """The layout of a matrix [rows, cols]. ``ModelError`` for an unknown format or a row of partial blocks."""
    f = FORMATS.get(format)
    if f is None:
        raise ModelError(f"The packed layout has no format {format}", why=f"it knows {', '.join(FORMATS)}")
    if rows < 1 or cols < 1 or cols % f.block or cols > 1 << 24:
        raise ModelError(
            f"A {format} matrix of {rows} x {cols} cannot be packed", why=f"rows are whole blocks of {f.block} values"
        )
    slack = ALIGN if cols % STEP else 0
    planes, at = {}, 0
    for name, row in _row_bytes(f, cols).items():
        if row:
            planes[name] = PackedPlane(at, row, _round_up(row * rows + slack))
            at += planes[name].nbytes
    return PackedLayout(f, rows, cols, planes, at)
