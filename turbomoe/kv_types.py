"""The names of KV types, without the codecs behind them: a wrong name is refused before torch is imported."""

from __future__ import annotations

import re
from difflib import get_close_matches

from turbomoe.errors import SettingsError

PLAIN = ("f32", "f16", "bf16")
SCALAR = ("q8_0", "tq4", "tq3", "tq2")
TRELLIS = ("tcq4", "tcq3", "tcq2.5", "tcq2")
KV_TYPES = (*PLAIN, *SCALAR, *TRELLIS)  # a codec for each: turbomoe.kv.codecs
ALIASES = {"turbo2": "tq2", "turbo3": "tq3", "turbo4": "tq4", "turbo2_tcq": "tcq2", "turbo3_tcq": "tcq3"}
AUTO = "auto"  # a KV type that ``insight.kv_auto`` replaces before anything is built

# What to say to somebody who knows other programs' formats, by bits: q4_0, iq4_nl, q5_1, int8 and the like.
_OTHER_FORMAT = re.compile(r"(?:i?q|int)([1-8])(?:_\w+)?")
_OTHER_BITS = re.compile(r"(tc?q)([1-9](?:\.\d+)?)")
_NEAREST = {
    "1": "The fewest bits are those of tq2 and tcq2",
    "2": "tq2 and tcq2 are about the same size",
    "3": "tq3 and tcq3 are about the same size",
    "4": "tq4 is about the same size, and tcq4 too, with less error",
    "5": "The nearest sizes are tcq4, a bit a value less, and q8_0",
    "6": "The nearest sizes are tcq4, two bits a value less, and q8_0",
    "7": "The nearest size is q8_0",
    "8": "q8_0 is the same size",
}


def kv_type(name: str) -> str:
    """The type that ``name`` means (case does not matter, aliases are replaced), or ``auto``.

    Raises ``SettingsError``, with the nearest known name, for any other.
    """
    small = name.lower()
    small = ALIASES.get(small, small)
    if small in (AUTO, *KV_TYPES):
        return small
    aliases = ", ".join(f"{alias} = {known}" for alias, known in ALIASES.items())
    fix = f"Choose auto (for -ctk and -ctv), or one of {', '.join(KV_TYPES)} ({aliases})"
    raise SettingsError(f"There is no KV cache type {name!r}", why=_nearest(small), fix=fix)


def _nearest(name: str) -> str:
    if match := _OTHER_FORMAT.fullmatch(name):
        return _NEAREST[match[1]]
    if match := _OTHER_BITS.fullmatch(name):
        kinds = TRELLIS if match[1] == "tcq" else SCALAR[1:]
        nearest = min(kinds, key=lambda kind: abs(float(kind[len(match[1]) :]) - float(match[2])))
        return f"The nearest name is {nearest}"
    found = get_close_matches(name, (AUTO, *KV_TYPES, *ALIASES), n=1)
    return f"The nearest name is {found[0]}" if found else ""
