"""Measurements on disk: whole, one's own and of this version, or refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbomoe.insight import kv_record
from turbomoe.insight.kv_record import Checks, Conditions, RecordedError, load_checks, save_checks
from turbomoe.insight.kv_search import Measured

IDENTITY = "a" * 64
CHECKS: Checks = {
    Conditions("b" * 64, 64, 256, "cpu auto", "text/1"): {
        ("q8_0", "q8_0"): Measured(0.00031, 1727, 1727),
        ("tq4", "tq2"): Measured(0.36, 128, 1727),
        ("tq2", "tq2"): Measured(0.5, 64, 1727, failed=True),
        ("tq2", "tq4"): Measured(0.0, 0, 1727, failed=True),
    },
    Conditions("", 0, 0, "cpu auto", "text/1"): {("tq3", "tq3"): Measured(0.0, 1, 1)},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "deep" / "kv-types.json"
    save_checks(path, IDENTITY, CHECKS)
    return path


def test_what_was_saved_comes_back(path: Path) -> None:
    assert load_checks(path, IDENTITY) == CHECKS
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_a_person_can_read_it(path: Path) -> None:
    first = json.loads(path.read_text())["checks"][0]
    counts = {"kl": 0.36, "tokens": 128, "of": 1727, "failed": False, "error": 0.0}
    assert first["arms"][1] == {"k": "tq4", "v": "tq2", **counts}


def test_another_model_s_is_refused(path: Path) -> None:
    with pytest.raises(RecordedError, match="belongs to another model"):
        load_checks(path, "c" * 64)


def test_every_changed_byte_is_refused_or_says_the_same(path: Path) -> None:
    """White space aside, there is no byte that can change without being noticed."""
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(RecordedError):
            load_checks(path, IDENTITY)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_cut_file_is_refused(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(RecordedError):
        load_checks(path, IDENTITY)


def resigned(path: Path, change) -> None:
    """Change the contents and put a good checksum under them."""
    body = json.loads(path.read_text())
    body.pop("digest")
    change(body)
    path.write_text(json.dumps({**body, "digest": kv_record._digest(body)}))


FORGED = {
    "older": lambda body: body.update(version=kv_record.VERSION - 1),
    "newer": lambda body: body.update(version=kv_record.VERSION + 1),
    "other format": lambda body: body.update(format="turbomoe-kv-means"),
    "no checks": lambda body: body.pop("checks"),
    "checks of another kind": lambda body: body.update(checks=7),
    "an unknown field": lambda body: body["checks"][0].update(colour="red"),
    "a missing field": lambda body: body["checks"][0].pop("sink"),
    "negative": lambda body: body["checks"][0]["arms"][0].update(kl=-1.0),
    "not a number": lambda body: body["checks"][0]["arms"][0].update(kl=float("nan")),
    "text": lambda body: body["checks"][0]["arms"][0].update(kl="small"),
    "beyond all floats": lambda body: body["checks"][0]["arms"][0].update(kl=10**400),
    "more than all": lambda body: body["checks"][0]["arms"][0].update(tokens=1728),
    "none": lambda body: body["checks"][0]["arms"][0].update(tokens=0),
    "failed by a word": lambda body: body["checks"][0]["arms"][0].update(failed="no"),
    "failed after the end": lambda body: body["checks"][0]["arms"][0].update(tokens=1728, failed=True),
    "an arm of another kind": lambda body: body["checks"][0].update(arms=[[]]),
}


@pytest.mark.parametrize("name", FORGED)
def test_numbers_are_checked_even_under_a_good_checksum(path: Path, name: str) -> None:
    resigned(path, FORGED[name])
    with pytest.raises(RecordedError):
        load_checks(path, IDENTITY)


def test_the_oldest_checks_go(tmp_path: Path) -> None:
    many: Checks = {Conditions("", n, 0, "", ""): {} for n in range(kv_record.MOST_CHECKS + 3)}
    save_checks(tmp_path / "f", IDENTITY, many)
    assert [conditions.sink for conditions in load_checks(tmp_path / "f", IDENTITY)] == list(range(3, len(many)))


names = st.sampled_from(["bf16", "q8_0", "tq4", "tq2"])
measured = st.builds(Measured, st.floats(0, 1e9), st.just(5), st.integers(5, 9), st.booleans())
arms = st.dictionaries(st.tuples(names, names), measured)
conditions = st.builds(
    Conditions, st.text(max_size=8), st.integers(0, 99), st.integers(0, 99), st.just("cpu auto"), st.text(max_size=8)
)


@given(st.dictionaries(conditions, arms, max_size=4))
def test_any_measurements_survive(tmp_path_factory: pytest.TempPathFactory, checks: Checks) -> None:
    path = tmp_path_factory.mktemp("record") / "f"
    save_checks(path, IDENTITY, checks)
    assert load_checks(path, IDENTITY) == checks


def test_a_pipe_in_its_place_does_not_wait_for_ever(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RecordedError, match="cannot be read"):
        load_checks(tmp_path / "pipe", IDENTITY)
