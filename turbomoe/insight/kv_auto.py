"""``auto``: the narrowest KV types that this model bears, checked at first use and remembered.

``resolve_kv_types`` measures what is not on disk yet; ``known_kv_types`` answers from disk alone, before any weight is
read. Both leave settings without ``auto`` as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace

from turbomoe.config import EngineSettings, KVChoice, KVSettings
from turbomoe.engine.calibrate import means_for, means_path
from turbomoe.files.atomic import WriteError
from turbomoe.insight.kv_check import FEWEST, Progress, check_ids, check_tokens, first_judged, measure
from turbomoe.insight.kv_ladder import (
    Facts,
    Ladder,
    bits_of,
    exact,
    filled,
    ladder_of,
    nothing_to_gain,
    wants_means,
    widest_need,
)
from turbomoe.insight.kv_pause import Pause, pause_path
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
from turbomoe.kv.means import KVMeans, MeansError
from turbomoe.kv_types import AUTO
from turbomoe.models.base import LoadedModel
from turbomoe.native.library import load_core
from turbomoe.notices import Notice, board

COST = "a minute or more"  # of a check
CODES = 3  # raised when a codec's codes or the transform before them come to mean something else


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
    conditions = Conditions(_basis(means), kv.sink, kv.recent, arithmetic(settings), text_key(kv, model.context_length))
    checks = _load(model.identity, conditions)
    arms = checks.setdefault(conditions, {})
    pause = Pause(pause_path(model.identity), asdict(conditions))
    told = {pair for pair, arm in arms.items() if arm.failed}

    def judge(limits: Mapping[Pair, float]) -> Mapping[Pair, Measured]:
        try:
            arms.update(measure(model, kv, means, ids, limits, progress, pause))
        except KeyboardInterrupt:
            pause.tell()
            raise
        _save(model.identity, checks)
        pause.end()
        return arms

    found = _searched(model, settings, arms, judge)
    _tell_failed([pair for pair, arm in arms.items() if arm.failed and pair not in told])
    return found


def known_kv_types(facts: Facts, settings: EngineSettings) -> EngineSettings | None:
    """The same without running anything: None where the model would have to be run."""
    if not settings.kv.is_auto:
        return settings
    kv = settings.kv
    if why := nothing_to_gain(facts, settings):
        return _unchecked(settings, why)
    try:
        means = KVMeans.load(means_path(facts.identity), facts.identity) if wants_means(facts, kv) else None
        checks = load_checks(record_path(facts.identity), facts.identity)
    except (MeansError, RecordedError):
        return None  # resolve_kv_types will say what is wrong with them
    conditions = Conditions(_basis(means), kv.sink, kv.recent, arithmetic(settings), text_key(kv, facts.context_length))

    def judge(limits: Mapping[Pair, float]) -> Mapping[Pair, Measured]:
        raise _NotMeasured

    try:
        return _searched(facts, settings, dict(checks.get(conditions, {})), judge)
    except _NotMeasured:
        return None


def text_key(kv: KVSettings, context_length: int) -> str:
    """Names the text of a check: which part of which text is up to ``check_tokens``."""
    return f"moby-dick/{check_tokens(kv, context_length)}"


def arithmetic(settings: EngineSettings) -> str:
    """Names what computes a run: packed weights alone move a KL by as much as q8_0 does, and new codes are others."""
    core = "plain" if load_core() is None else "core"
    return f"{settings.device.partition(':')[0]} {settings.dtype} {core} codes {CODES}"


def nothing_to_check(model: LoadedModel, settings: EngineSettings) -> str:
    """Why bf16 is the answer without running the model; empty where it has to be run."""
    if why := nothing_to_gain(model, settings):
        return why
    if model.tokenizer is None:
        return "a model without a tokenizer cannot read the text of the check"
    behind = len(check_ids(model, settings.kv)) - first_judged(settings.kv)
    return "" if behind >= FEWEST else "too few tokens of text lie behind the exact windows to judge by"


def _unchecked(settings: EngineSettings, why: str) -> EngineSettings:
    kv = exact(settings.kv)
    return _settle(settings, kv, KVChoice(kv.type_k, kv.type_v, why=why))


def _searched(facts: Facts, settings: EngineSettings, arms: dict[Pair, Measured], judge: Judge) -> EngineSettings:
    kv, ladder = settings.kv, ladder_of(facts.layers)
    named = {name for name in (kv.type_k, kv.type_v) if name != AUTO}
    bits = {name: bits_of(name, facts.layers) for name in {EXACT, *ladder.types, *named}}
    found = Search((kv.type_k, kv.type_v), ladder.types, bits, kv.budget, arms, judge).run()
    return _settle(settings, filled(kv, *found.pair), _choice(kv, found, ladder))


def _choice(kv: KVSettings, found: Found, ladder: Ladder) -> KVChoice:
    chosen, anchor = found.tried.get(found.pair), found.tried.get(ANCHOR)
    return KVChoice(
        *found.pair,
        why=_why(*(_wide(side, kv, found, ladder) for side in (0, 1))),
        mean_kl=None if chosen is None else chosen.kl,
        budget=found.budget,
        q8_0=None if anchor is None or anchor.failed else anchor.kl,
        tokens=max(arm.of for arm in found.tried.values()),
        tried=tuple(arms_json(found.tried)),
        skipped=ladder.skipped,
    )


def _why(keys: str, values: str) -> str:
    """Both reasons of ``_wide`` in a sentence, once where they are the same."""
    if keys == values and keys:
        return f"keys and values {keys}"
    return "; ".join(f"{side} {why}" for side, why in (("keys", keys), ("values", values)) if why)


def _wide(side: int, kv: KVSettings, found: Found, ladder: Ladder) -> str:
    """Why keys (side 0) or values (1) stay at 8 bits or more: the least KL among what was tried one step below."""
    mine = found.pair[side]
    if (kv.type_k, kv.type_v)[side] != AUTO or mine not in (EXACT, LADDER[0]):
        return ""
    below = ladder.types[ladder.types.index(mine) + 1 :] if mine in ladder.types else ladder.types
    tried = [arm for pair, arm in found.tried.items() if pair[side] in below[:1]]
    if not tried:
        return f"stay at {mine}: its heads do not fit narrower types"
    kls = [arm.kl for arm in tried if not arm.failed]
    why = f"KL is {min(kls):.2g}" if kls else "numbers are not finite"
    return f"stay at {mine}: at {below[0]} {why}"


def _settle(settings: EngineSettings, kv: KVSettings, choice: KVChoice) -> EngineSettings:
    return replace(settings, kv=replace(kv, budget=None), kv_choice=choice)


def _tell_failed(pairs: list[Pair]) -> None:
    """One note for all pairs that this check has found to be of no use."""
    if not pairs:
        return
    names = ", ".join(f"{key}/{value}" for key, value in pairs)
    why = f"under {names} this model computes numbers that are not finite"
    board.post(Notice("KV types left out of the choice", why, expected=True))


def _basis(means: KVMeans | None) -> str:
    return "" if means is None else means.digest


def _load(identity: str, conditions: Conditions) -> Checks:
    """What is on disk; measurements under means that the model has no more are dropped."""
    path = record_path(identity)
    if not path.exists():
        return {}
    try:
        checks = load_checks(path, identity)
    except RecordedError as error:
        board.post(Notice("checking the KV types again", str(error).rstrip("."), f"{COST}; the file is then replaced"))
        return {}
    kept = {known: arms for known, arms in checks.items() if not known.basis or known.basis == conditions.basis}
    if not conditions.basis:
        return checks
    if len(kept) < len(checks):
        board.post(Notice("checking the KV types again", "the means have changed", COST, expected=True))
    return kept


def _save(identity: str, checks: Checks) -> None:
    try:
        save_checks(record_path(identity), identity, checks)
    except WriteError as error:
        avoid = "make room there, or set TURBOMOE_HOME to a folder that can be written"
        board.post(Notice("the KV types are not kept", str(error).rstrip("."), "checking again next time", avoid))
