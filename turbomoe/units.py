"""Sizes as people write and read them: ``2G`` in, ``2.0 GiB`` out."""

from __future__ import annotations

import re

from turbomoe.errors import SettingsError

_SIZE = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)\s*([kmgt])(ib|b)?", re.IGNORECASE | re.ASCII)
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str) -> int:
    """Bytes in ``text``: ``2G`` and ``2GiB`` are 2 * 1024**3, ``2GB`` is 2 * 1000**3, ``0`` is nothing.

    Raises ``SettingsError`` for anything else; a bare number is refused because nobody agrees on its unit.
    """
    if text.strip() == "0":
        return 0
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise SettingsError(f"{text!r} is not a size", fix="Write a number and a unit, as in 512M, 2G or 1.5G")
    number, unit, suffix = match.groups()
    base = 1000 if (suffix or "").lower() == "b" else 1024
    return int(float(number) * base ** _POWERS[unit.lower()])


def format_bytes(count: int) -> str:
    """``count`` bytes in the largest binary unit that leaves at least 1: ``17 B``, ``1.5 KiB``, ``2.0 GiB``."""
    value, units = float(count), ("B", "KiB", "MiB", "GiB", "TiB")
    for unit in units[:-1]:
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} {units[-1]}"
