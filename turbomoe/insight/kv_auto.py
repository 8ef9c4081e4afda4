"""``auto``: the narrowest KV types that this model bears, checked at first use and remembered.

``resolve_kv_types`` measures what is not on disk yet; ``known_kv_types`` answers from disk alone, before any weight is
read. Both leave settings without ``auto`` as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from turbomoe.config import AUTO, EngineSettings, KVChoice, KVSettings
from turbomoe.engine.calibrate import means_for, means_path
from turbomoe.errors import SettingsError
from turbomoe.files.atomic import WriteError
from turbomoe.insight.kv_check import FEWEST, Progress, check_ids, check_tokens, first_judged, measure
from turbomoe.insight.kv_record import (
    Checks,
    Conditions,
    RecordedError,
    arms_json,
    load_checks,
    record_path,
    save_checks,
)
from turbomoe.insight.kv_search import ANCHOR, EXACT, LADDER, Found, Judge, Measured, Pair, Search
from turbomoe.kv.codecs import make_codec
from turbomoe.kv.means import KVMeans, MeansError
from turbomoe.kv.shape import AttentionShape, LayerShape
from turbomoe.models.base import LoadedModel
from turbomoe.notices import Notice, board


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


class _NotMeasured(Exception):
    pass


def resolve_kv_types(model: LoadedModel, settings: EngineSettings, progress: Progress | None = None) -> EngineSettings:
    """``settings`` with types in place of ``auto``; runs the model unless enough is on disk.

    ``progress(done, total)`` hears of the tokens of each pass. Measurements that cannot be read or kept are a note.
    """
    if not settings.kv.is_auto:
        return settings
    if why := nothing_to_check(model, settings):
        return _unchecked(settings, why)
    kv, ids = settings.kv, check_ids(model, settings.kv)
    means = means_for(model, widest_need(model, kv))
    conditions = Conditions(_basis(means), kv.sink, kv.recent, text_key(kv, model.context_length))
    checks = _load(model.identity, conditions)
    arms = checks.setdefault(conditions, {})

    def judge(limits: Mapping[Pair, float]) -> Mapping[Pair, Measured]:
        arms.update(measure(model, kv, means, ids, limits, progress))
        _save(model.identity, checks)
        return arms

    return _searched(model, settings, arms, judge)


def known_kv_types(facts: Facts, settings: EngineSettings) -> EngineSettings | None:
    """The same without running anything: None where the model would have to be run."""
    if not settings.kv.is_auto:
        return settings
    kv = settings.kv
    if why := nothing_to_gain(facts, settings):
        return _unchecked(settings, why)
    try:
        means = KVMeans.load(means_path(facts.identity), facts.identity) if _needs_means(facts, kv) else None
        checks = load_checks(record_path(facts.identity), facts.identity)
    except (MeansError, RecordedError):
        return None  # resolve_kv_types will say what is wrong with them
    conditions = Conditions(_basis(means), kv.sink, kv.recent, text_key(kv, facts.context_length))

    def judge(limits: Mapping[Pair, float]) -> Mapping[Pair, Measured]:
        raise _NotMeasured

    try:
        return _searched(facts, settings, dict(checks.get(conditions, {})), judge)
    except _NotMeasured:
        return None


def candidates(facts: Facts, kv: KVSettings) -> list[KVSettings]:
    """Settings between which the bytes of every answer to ``auto`` lie."""
    types = ladder_of(facts.layers).types
    alike = [_filled(kv, name, name) for name in (EXACT, *types)]
    return [*alike, *(_filled(kv, EXACT, name) for name in types[:1])]


def rounds(facts: Facts, kv: KVSettings) -> list[list[KVSettings]]:
    """Settings that a check may run side by side, for its memory: the first round, and the largest second one."""
    types = ladder_of(facts.layers).types
    beside_exact = [*(_filled(kv, EXACT, name) for name in types), *(_filled(kv, name, EXACT) for name in types[:1])]
    return [[_filled(kv, name, name) for name in types], beside_exact]


def exact(kv: KVSettings) -> KVSettings:
    """``kv`` with bf16 where it says ``auto``."""
    return _filled(kv, EXACT, EXACT)


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
    skipped: dict[str, str] = {}
    for name in LADDER:
        for size in sorted({shape.head_dim for shape in _full(layers)}):
            try:
                make_codec(name, size)
            except SettingsError as error:
                skipped[name] = f"{error.what}: {error.why}" if error.why else error.what
    return Ladder(tuple(name for name in LADDER if name not in skipped), skipped)


def text_key(kv: KVSettings, context_length: int) -> str:
    """Names the text of a check: which part of which text is up to ``check_tokens`` and this module's version."""
    return f"moby-dick/{check_tokens(kv, context_length)}"


def nothing_to_check(model: LoadedModel, settings: EngineSettings) -> str:
    """Why bf16 is the answer without running the model; empty where it has to be run."""
    if why := nothing_to_gain(model, settings):
        return why
    if model.tokenizer is None:
        return "a model without a tokenizer cannot read the text of the check"
    behind = len(check_ids(model, settings.kv)) - first_judged(settings.kv)
    return (
        f"{max(0, behind)} tokens of text behind the exact windows are too few to judge by" if behind < FEWEST else ""
    )


def _unchecked(settings: EngineSettings, why: str) -> EngineSettings:
    kv = exact(settings.kv)
    return _settle(settings, kv, KVChoice(kv.type_k, kv.type_v, why=why))


def _searched(facts: Facts, settings: EngineSettings, arms: dict[Pair, Measured], judge: Judge) -> EngineSettings:
    kv, ladder = settings.kv, ladder_of(facts.layers)
    named = {name for name in (kv.type_k, kv.type_v) if name != AUTO}
    bits = {name: _bits(name, facts.layers) for name in {EXACT, *ladder.types, *named}}
    found = Search((kv.type_k, kv.type_v), ladder.types, bits, kv.budget, arms, judge).run()
    return _settle(settings, _filled(kv, *found.pair), _choice(kv, found, ladder, bits))


def _choice(kv: KVSettings, found: Found, ladder: Ladder, bits: Mapping[str, float]) -> KVChoice:
    chosen, anchor = found.tried.get(found.pair), found.tried.get(ANCHOR)
    return KVChoice(
        *found.pair,
        why="; ".join(filter(None, (_wide(side, kv, found, ladder) for side in (0, 1)))),
        mean_kl=None if chosen is None else chosen.kl,
        budget=found.budget,
        q8_0=None if anchor is None else anchor.kl,
        tokens=max(arm.of for arm in found.tried.values()),
        tried=tuple(arms_json(found.tried)),
        skipped=ladder.skipped,
    )


def _wide(side: int, kv: KVSettings, found: Found, ladder: Ladder) -> str:
    """Why keys (side 0) or values (1) stay at 8 bits or more: the least KL among what was tried one step below."""
    mine, name = found.pair[side], ("keys", "values")[side]
    below = ladder.types[ladder.types.index(mine) + 1 :] if mine in ladder.types else ladder.types
    if (kv.type_k, kv.type_v)[side] != AUTO or mine not in (EXACT, LADDER[0]) or not below:
        return ""
    kls = [arm.kl for pair, arm in found.tried.items() if pair[side] == below[0]]
    return f"{name} stay at {mine}: at {below[0]} KL is {min(kls):.2g}" if kls else ""


def _settle(settings: EngineSettings, kv: KVSettings, choice: KVChoice) -> EngineSettings:
    return replace(settings, kv=replace(kv, budget=None), kv_choice=choice)


def _filled(kv: KVSettings, key: str, value: str) -> KVSettings:
    return replace(
        kv,
        type_k=key if kv.type_k == AUTO else kv.type_k,
        type_v=value if kv.type_v == AUTO else kv.type_v,
    )


def _types(kv: KVSettings) -> Pair:
    return kv.type_k, kv.type_v


def _full(layers: Sequence[LayerShape]) -> list[AttentionShape]:
    return [shape for shape in layers if isinstance(shape, AttentionShape) and not shape.window]


def _bits(name: str, layers: Sequence[LayerShape]) -> float:
    """Bits a value of one side, scales included, over the full-attention layers."""
    sizes = [(shape.kv_heads * shape.head_dim, make_codec(name, shape.head_dim)) for shape in _full(layers)]
    return sum(values * codec.bits_per_value for values, codec in sizes) / sum(values for values, _ in sizes)


def widest_need(facts: Facts, kv: KVSettings) -> KVSettings:
    """Settings in place of ``kv`` that use means if anything the search may try does."""
    rotated = [name for name in ladder_of(facts.layers).types if _rotated(name, facts.layers)]
    return _filled(kv, *(rotated[:1] or [EXACT]) * 2)


def _needs_means(facts: Facts, kv: KVSettings) -> bool:
    need = widest_need(facts, kv)
    return kv.means and any(_rotated(name, facts.layers) for name in _types(need))


def _rotated(name: str, layers: Sequence[LayerShape]) -> bool:
    return any(make_codec(name, shape.head_dim).rotated for shape in _full(layers))


def _basis(means: KVMeans | None) -> str:
    return "" if means is None else means.digest


def _load(identity: str, conditions: Conditions) -> Checks:
    """What is on disk; measurements under other means are dropped, for they will not come back."""
    path = record_path(identity)
    if not path.exists():
        return {}
    try:
        checks = load_checks(path, identity)
    except RecordedError as error:
        board.post(Notice("checking the KV types again", str(error).rstrip("."), "about a minute"))
        return {}
    kept = {known: arms for known, arms in checks.items() if known.basis == conditions.basis}
    if len(kept) < len(checks):
        board.post(Notice("checking the KV types again", "the means have changed", "about a minute"))
    return kept


def _save(identity: str, checks: Checks) -> None:
    try:
        save_checks(record_path(identity), identity, checks)
    except WriteError as error:
        avoid = "make room there, or set TURBOMOE_HOME to a folder that can be written"
        board.post(Notice("the KV types are not kept", str(error).rstrip("."), "checking again next time", avoid))
