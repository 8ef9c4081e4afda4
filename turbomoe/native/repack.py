"""Packing and unpacking in PyTorch: the reference for the C core's packer, and its stand-in where no core is there.

``pack`` moves the bits of GGUF blocks into planes, ``unpack`` computes the float32 values that the planes mean, in the
order of operations of the GGUF format, so that a matrix unpacks to the same bits as its blocks dequantise to.
"""

from __future__ import annotations

import torch

from turbomoe.errors import ModelError
from turbomoe.native.layout import GROUP, SUPER, PackedFormat, PackedLayout, packed_layout


def _nibbles(q: torch.Tensor) -> torch.Tensor:
    """Bytes [..., 16] of a group to its 32 nibbles in value order: low ones first."""
    return torch.cat((q & 15, q >> 4), dim=-1)


def _join_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Codes [..., 32] to 16 bytes: value j beside value 16 + j."""
    return (codes[..., :16] & 15) | ((codes[..., 16:] & 15) << 4)


# Position of value j of group i within a high line: byte 16 * t + j % 16, first bit of the field.
def _high_fields(bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    group, value = torch.arange(8).unsqueeze(1), torch.arange(GROUP).unsqueeze(0)
    lanes = 2 * bits
    byte = group % lanes * 16 + value % 16
    shift = group // lanes * lanes + value // 16 * bits
    return byte, shift.to(torch.int32)


def _join_high(high: torch.Tensor, bits: int) -> torch.Tensor:
    """High bits [rows, groups, 32] to lines [rows, lines * 32 * bits] of 8 groups each; absent groups are 0."""
    rows, groups, _ = high.shape
    lines = -(-groups // 8)
    padded = torch.zeros(rows, lines * 8, GROUP, dtype=torch.int32)
    padded[:, :groups] = high
    byte, shift = _high_fields(bits)
    out = torch.zeros(rows, lines, 32 * bits, dtype=torch.int32)
    # Fields of one byte never overlap, so that addition is an OR.
    out.index_add_(2, byte.flatten(), (padded.view(rows, lines, 8, GROUP) << shift).flatten(2))
    return out.to(torch.uint8).flatten(1)


def _split_high(lines: torch.Tensor, groups: int, bits: int) -> torch.Tensor:
    """The inverse of ``_join_high``: [rows, groups, 32] int32."""
    byte, shift = _high_fields(bits)
    per_line = lines.view(len(lines), -1, 32 * bits).to(torch.int32)
    fields = (per_line[:, :, byte] >> shift) & ((1 << bits) - 1)
    return fields.flatten(1, 2)[:, :groups]


def _six_bit(s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The 12 bytes [..., 12] of Q4_K and Q5_K to 8 scales and 8 mins."""
    a, b, c = s[..., :4], s[..., 4:8], s[..., 8:]
    scales = torch.cat((a & 63, (c & 15) | (a >> 6 << 4)), dim=-1)
    return scales, torch.cat((b & 63, (c >> 4) | (b >> 6 << 4)), dim=-1)


Planes = dict[str, torch.Tensor]  # plane name -> uint8 [rows, row bytes]


def _planes_q32(f: PackedFormat, b: torch.Tensor) -> Planes:
    """Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL: scale [, min] [, 4 bytes of fifth bits], nibbles in plane order."""
    planes = {"scales": b[..., :2], "codes": b[..., -16:]}
    if f.min != "none":
        planes["mins"] = b[..., 2:4]
    if f.high_bits:
        bits = (b[..., -20:-16].unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
        planes["high"] = _join_high(bits.flatten(-2).to(torch.int32), 1)
    return planes


def _planes_q8(f: PackedFormat, b: torch.Tensor) -> Planes:
    return {"scales": b[..., :2], "codes": torch.cat((b[..., 2:18].flatten(1), b[..., 18:].flatten(1)), dim=1)}


def _planes_mxfp4(f: PackedFormat, b: torch.Tensor) -> Planes:
    return {"scales": b[..., :1], "codes": b[..., 1:]}


def _planes_k45(f: PackedFormat, b: torch.Tensor) -> Planes:
    """Q4_K, Q5_K: 64 values are 32 bytes of nibbles, low ones the first group, high ones the second."""
    scales, mins = _six_bit(b[..., 4:16])
    low = b[..., -128:].unflatten(-1, (4, 32))
    codes = torch.stack((low & 15, low >> 4), dim=-2).flatten(-3, -2)
    planes = {"supers": b[..., :4], "scales": scales, "mins": mins, "codes": _join_nibbles(codes)}
    if f.high_bits:
        bits = (b[..., 16:48].unsqueeze(-2) >> torch.arange(8, dtype=torch.uint8).unsqueeze(1)) & 1
        planes["high"] = _join_high(bits.flatten(1, 2).to(torch.int32), 1)
    return planes


def _planes_q6k(f: PackedFormat, b: torch.Tensor) -> Planes:
    """Q6_K: two halves of 128 values; a half is 64 bytes of nibbles, 32 bytes of bit pairs, 8 signed scales."""
    low = b[..., :128].unflatten(-1, (2, 2, 32))  # half, pair of groups, byte
    codes = torch.cat((low & 15, low >> 4), dim=-2).flatten(-3, -2)
    pairs = b[..., 128:192].unflatten(-1, (2, 1, 32)) >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8).unsqueeze(1)
    scales = b[..., 192:208].unflatten(-1, (8, 2)).flatten(1, 2)
    return {
        "supers": b[..., 208:],
        "scales": torch.cat((scales[..., 0], scales[..., 1]), dim=1),
        "codes": _join_nibbles(codes),
        "high": _join_high((pairs & 3).flatten(1, 3).to(torch.int32), 2),
    }


_PACKERS = {"Q8_0": _planes_q8, "MXFP4": _planes_mxfp4, "Q4_K": _planes_k45, "Q5_K": _planes_k45, "Q6_K": _planes_q6k}


def _check_finite(layout: PackedLayout, planes: Planes) -> None:
    """Scales that are no numbers would poison whole rows (and what a kernel reads beside them)."""
    f = layout.format
    if f.is_float:
        dtype = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[f.name]
        bad = ~torch.isfinite(planes["codes"].contiguous().view(dtype))
    elif f.scale == "e8m0":
        bad = planes["scales"].flatten(1) == 255
    else:
        halves = [planes[n].flatten(1) for n in ("supers", "scales", "mins") if n in planes and _is_f16(f, n)]
        bad = ~torch.isfinite(torch.cat(halves, dim=1).contiguous().view(torch.float16))
    rows = bad.flatten(1).any(dim=1).nonzero()
    if len(rows):
        raise not_finite(f.name, int(rows[0]))


def _is_f16(f: PackedFormat, plane: str) -> bool:
    return plane == "supers" or (f.scale == "f16" and plane == "scales") or (f.min == "f16" and plane == "mins")


def not_finite(format: str, row: int) -> ModelError:
    """The error for a scale (or a float weight) that is infinite or no number."""
    return ModelError(
        f"Row {row} of a {format} matrix holds a scale that is no finite number",
        why="the file is damaged or was converted from a broken model",
        fix="download or convert the model again",
    )


def pack(raw: torch.Tensor, format: str, rows: int, cols: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """GGUF blocks (uint8, row-major) into a packed matrix: uint8 [nbytes], written to ``out`` where given.

    ``ModelError`` for a wrong number of bytes, an impossible shape, or a scale that is not finite.
    """
    layout = packed_layout(format, rows, cols)
    check_bytes(layout, raw)
    f = layout.format
    blocks = raw.reshape(rows, cols // f.block, f.block_bytes)
    planes = {"codes": blocks.flatten(1)} if f.is_float else _PACKERS.get(format, _planes_q32)(f, blocks)
    _check_finite(layout, planes)
    blob = torch.zeros(layout.nbytes, dtype=torch.uint8) if out is None else out.zero_()
    for name, plane in layout.planes.items():
        blob[plane.offset : plane.offset + rows * plane.row_bytes] = planes[name].flatten()
    return blob


def check_bytes(layout: PackedLayout, raw: torch.Tensor) -> None:
    """``ModelError`` unless ``raw`` holds exactly the GGUF blocks of this matrix."""
    if raw.numel() != layout.raw_bytes:
        shape = f"{layout.rows} x {layout.cols}"
        raise ModelError(f"A {layout.format.name} matrix of {shape} is {layout.raw_bytes} bytes, not {raw.numel()}")


def plane_bytes(blob: torch.Tensor, layout: PackedLayout, name: str) -> torch.Tensor:
    """One plane of a packed matrix: a uint8 view [rows, row bytes]."""
    plane = layout.planes[name]
    return blob[plane.offset : plane.offset + layout.rows * plane.row_bytes].view(layout.rows, plane.row_bytes)


def _codes(blob: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    """What codes mean before scales: float32 [rows, groups, 32]."""
    f, groups = layout.format, layout.cols // GROUP
    codes = plane_bytes(blob, layout, "codes")
    if f.code_bits == 8:
        halves = codes.view(torch.int8).view(layout.rows, 2, groups, 16)
        return halves.transpose(1, 2).flatten(2).float()
    values = _nibbles(codes.view(layout.rows, groups, 16)).to(torch.int32)
    if f.high_bits:
        values |= _split_high(plane_bytes(blob, layout, "high"), groups, f.high_bits) << 4
    if f.table:
        return torch.tensor(f.table, dtype=torch.float32)[values]
    return (values - f.zero).float()


def _f16(bytes_: torch.Tensor) -> torch.Tensor:
    return bytes_.contiguous().view(torch.float16).float()


def _e8m0(bytes_: torch.Tensor) -> torch.Tensor:
    """Half of 2^(e - 127), exactly, subnormals included: the table of MXFP4 holds doubled values."""
    return torch.tensor([2.0 ** (e - 128) for e in range(256)], dtype=torch.float64).float()[bytes_.to(torch.int32)]


def _scales(blob: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    """Scale per value, broadcastable to [rows, groups, 32]."""
    f = layout.format
    scales = plane_bytes(blob, layout, "scales")
    if f.scale == "f16":
        return _f16(scales).unsqueeze(-1)
    if f.scale == "e8m0":
        return _e8m0(scales).unsqueeze(-1)
    supers = _f16(plane_bytes(blob, layout, "supers"))
    if f.scale == "two":
        d = supers[:, 0::2].repeat_interleave(SUPER // GROUP, dim=1)
        return (d * scales).unsqueeze(-1)
    halves = scales.view(torch.int8).view(layout.rows, 2, -1).transpose(1, 2)
    d = supers.repeat_interleave(SUPER // GROUP, dim=1)
    return (d.unsqueeze(-1) * halves).repeat_interleave(16, dim=2)


def _mins(blob: torch.Tensor, layout: PackedLayout) -> torch.Tensor | None:
    """What is added to every value of a group: [rows, groups, 1], or None."""
    f = layout.format
    if f.min == "none":
        return None
    mins = plane_bytes(blob, layout, "mins")
    if f.min == "f16":
        return _f16(mins).unsqueeze(-1)
    supers = _f16(plane_bytes(blob, layout, "supers"))
    return -(supers[:, 1::2].repeat_interleave(SUPER // GROUP, dim=1) * mins).unsqueeze(-1)


def unpack(blob: torch.Tensor, format: str, rows: int, cols: int) -> torch.Tensor:
    """A packed matrix as float32 [rows, cols]: the exact values that its codes and scales mean."""
    layout = packed_layout(format, rows, cols)
    if layout.format.is_float:
        dtype = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[format]
        return plane_bytes(blob, layout, "codes").contiguous().view(dtype).float()
    values = _scales(blob, layout) * _codes(blob, layout)
    mins = _mins(blob, layout)
    return (values if mins is None else values + mins).view(rows, cols)
