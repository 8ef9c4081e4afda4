"""What was measured of a model's KV types, kept beside its means: ``kv-types.json``.

The file holds measurements, not decisions: another budget, or one side given, often needs nothing new. Delete it to
measure again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from turbomoe.config import state_dir
from turbomoe.errors import ModelFileError, TurbomoeError
from turbomoe.files.atomic import write_text
from turbomoe.files.json_file import read_json_object
from turbomoe.insight.kv_search import Measured, Pair

FORMAT, VERSION = "turbomoe-kv-types", 3
LARGEST_FILE = 1 << 20
MOST_CHECKS = 32  # other windows, other means: the oldest go


class RecordedError(TurbomoeError):
    """A file of measurements that cannot be used: damaged, of another version, or another model's."""


@dataclass(frozen=True)
class Conditions:
    """What a measurement depends on: the means that codes were centred by, windows, precision of the run, text."""

    basis: str
    sink: int
    recent: int
    arithmetic: str
    text: str


Checks = dict[Conditions, dict[Pair, Measured]]


def record_path(identity: str) -> Path:
    """Where the measurements of the model with this identity are kept."""
    return state_dir() / "models" / identity / "kv-types.json"


def save_checks(path: Path, identity: str, checks: Checks) -> None:
    """Write the newest checks, whole or not at all. Raises ``files.atomic.WriteError``."""
    newest = list(checks.items())[-MOST_CHECKS:]
    body = {
        "format": FORMAT,
        "version": VERSION,
        "identity": identity,
        "checks": [{**asdict(conditions), "arms": arms_json(arms)} for conditions, arms in newest],
    }
    write_text(path, json.dumps({**body, "digest": _digest(body)}, indent=1) + "\n")


def arms_json(arms: Mapping[Pair, Measured]) -> list[dict[str, Any]]:
    """One object a pair."""
    return [{"k": key, "v": value, **asdict(measured)} for (key, value), measured in arms.items()]


def load_checks(path: Path, identity: str) -> Checks:
    """Everything measured of the model ``identity``; raises ``RecordedError`` unless the file is whole and its own."""
    try:
        body = read_json_object(path, LARGEST_FILE)
    except ModelFileError as error:
        raise RecordedError(f"The KV types in {path} cannot be read", why=error.reason) from error
    if (body.get("format"), body.get("version")) != (FORMAT, VERSION):
        raise RecordedError(f"{path} was not written by this version")
    if body.pop("digest", None) != _digest(body):
        raise RecordedError(f"The contents of {path} do not match their checksum")
    if body.get("identity") != identity:
        raise RecordedError(f"{path} belongs to another model")
    try:
        return dict(_check(item) for item in body["checks"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise RecordedError(f"{path} holds what was never measured") from error


def _check(item: dict[str, Any]) -> tuple[Conditions, dict[Pair, Measured]]:
    arms = {(str(arm.pop("k")), str(arm.pop("v"))): _measured(Measured(**arm)) for arm in item.pop("arms")}
    return Conditions(**item), arms


def _measured(arm: Measured) -> Measured:
    counted = 0 < arm.tokens <= arm.of or (arm.failed and 0 == arm.tokens < arm.of)
    numbers = all(isfinite(number) and number >= 0 for number in (arm.kl, arm.error))
    if not (numbers and counted and isinstance(arm.failed, bool)):
        raise ValueError(f"no measurement: {arm}")
    return arm


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
