"""Which KV types a model can be offered at all, and what the answers to ``auto`` may take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from turbomoe.config import EngineSettings, KVSettings
from turbomoe.errors import SettingsError
from turbomoe.insight.kv_search import EXACT, LADDER, SCALAR
from turbomoe.kv.codecs import make_codec
from turbomoe.kv.shape import AttentionShape, LayerShape
from turbomoe.kv_types import AUTO
from turbomoe.native.library import load_core


class Facts(Protocol):
    """What a ``Forecast`` and a ``LoadedModel`` both know."""

    @property
    def layers(self) -> tuple[LayerShape, ...]: ...
    @property
    def context_length(self) -> int: ...
    @property
    def identity(self) -> str: ...


@dataclass(frozen=True)
class Ladder:
    """The types that every full-attention layer of a model can store, widest first; why the others cannot."""

    types: tuple[str, ...]
    skipped: Mapping[str, str]


def candidates(facts: Facts, kv: KVSettings) -> list[KVSettings]:
    """Settings between which the bytes of every answer to ``auto`` lie."""
    types = ladder_of(facts.layers).types
    alike = [filled(kv, name, name) for name in (EXACT, *types)]
    return [*alike, *(filled(kv, EXACT, name) for name in types[:1])]


def rounds(facts: Facts, kv: KVSettings) -> list[list[KVSettings]]:
    """Settings that a check may run side by side, for its memory: the first round, and the largest second one."""
    types = ladder_of(facts.layers).types
    beside_exact = [*(filled(kv, EXACT, name) for name in types), *(filled(kv, name, EXACT) for name in types[:1])]
    return [[filled(kv, name, name) for name in types], beside_exact]


def most_pairs(facts: Facts, kv: KVSettings) -> int:
    """How many pairs of types a check may try: all of the ladder, and what lies around the one that passes."""
    types = len(ladder_of(facts.layers).types)
    return 2 * types + 1 if (kv.type_k, kv.type_v) == (AUTO, AUTO) else types + 1


def exact(kv: KVSettings) -> KVSettings:
    """``kv`` with bf16 where it says ``auto``."""
    return filled(kv, EXACT, EXACT)


def nothing_to_gain(facts: Facts, settings: EngineSettings) -> str:
    """Why every choice would store the same as bf16; empty where one would not."""
    if not _full(facts.layers):
        return "no layer of this model stores a growing past"
    windows = settings.kv.sink + settings.kv.recent
    if (settings.ctx_size or facts.context_length) <= windows:
        return f"a context of at most {windows} tokens lies in the exact windows"
    return "" if ladder_of(facts.layers).types else "no codec fits the heads of this model"


def ladder_of(layers: Sequence[LayerShape]) -> Ladder:
    """Which types of the ladder this model's heads fit."""
    names = SCALAR if load_core() is None else LADDER
    skipped: dict[str, str] = {}
    for name in names:
        for size in sorted({shape.head_dim for shape in _full(layers)}):
            try:
                make_codec(name, size)
            except SettingsError as error:
                skipped[name] = f"{error.what}: {error.why}" if error.why else error.what
    return Ladder(tuple(name for name in names if name not in skipped), skipped)


def filled(kv: KVSettings, key: str, value: str) -> KVSettings:
    return replace(
        kv,
        type_k=key if kv.type_k == AUTO else kv.type_k,
        type_v=value if kv.type_v == AUTO else kv.type_v,
    )


def _full(layers: Sequence[LayerShape]) -> list[AttentionShape]:
    return [shape for shape in layers if isinstance(shape, AttentionShape) and not shape.window]


def bits_of(name: str, layers: Sequence[LayerShape]) -> float:
    """Bits a value of one side, scales included, over the full-attention layers."""
    sizes = [(shape.kv_heads * shape.head_dim, make_codec(name, shape.head_dim)) for shape in _full(layers)]
    return sum(values * codec.bits_per_value for values, codec in sizes) / sum(values for values, _ in sizes)


def widest_need(facts: Facts, kv: KVSettings) -> KVSettings:
    """Settings in place of ``kv`` that use means if anything the search may try does."""
    rotated = [name for name in ladder_of(facts.layers).types if _rotated(name, facts.layers)]
    return filled(kv, *(rotated[:1] or [EXACT]) * 2)


def wants_means(facts: Facts, kv: KVSettings) -> bool:
    need = widest_need(facts, kv)
    return kv.means and any(_rotated(name, facts.layers) for name in (need.type_k, need.type_v))


def _rotated(name: str, layers: Sequence[LayerShape]) -> bool:
    return any(make_codec(name, shape.head_dim).rotated for shape in _full(layers))
