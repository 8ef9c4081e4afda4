"""What tells a person, or the reader of a log, that something takes long."""

from __future__ import annotations

import pytest

from turbomoe.cli import loading
from turbomoe.cli.loading import BETWEEN_LINES, Bar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in a list, to be set."""
    now = [100.0]
    monkeypatch.setattr(loading.time, "monotonic", lambda: now[0])
    return now


def test_a_log_hears_of_it_now_and_then(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("judging", unit="token") as bar:
        for done in range(0, 1001, 100):
            bar(done, 1000)
            clock[0] += 0.3 * BETWEEN_LINES
    told = capsys.readouterr().err.splitlines()
    assert told == ["judging: 400 of 1000 tokens", "judging: 800 of 1000 tokens"]


def test_a_log_hears_nothing_of_what_is_short(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("loading") as bar:
        bar(0, 1 << 40)
        clock[0] += 0.9 * BETWEEN_LINES
        bar(1 << 39, 1 << 40)
        clock[0] += 0.2 * BETWEEN_LINES
        bar(3 << 38, 1 << 40)
        clock[0] += BETWEEN_LINES
        bar(1 << 40, 1 << 40)
    assert capsys.readouterr().err == "loading: 768.0 GiB of 1.0 TiB\n"


def test_a_person_sees_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Bar("judging", unit="token") as bar:
        bar(0, 1000)
        bar(500, 1000)
    assert "judging" in capsys.readouterr().err
