"""A check that is broken off goes on to the same figures, or begins anew where its file is of no use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest

from tests.cli.tiny_chat import CONTEXT, write_chat_model
from turbomoe.config import EngineSettings, KVSettings
from turbomoe.engine.calibrate import means_for
from turbomoe.engine.runner import ModelRunner
from turbomoe.files.array_file import load_arrays, save_arrays
from turbomoe.insight import kv_check, kv_pause
from turbomoe.insight.kv_auto import resolve_kv_types
from turbomoe.insight.kv_check import check_ids, measure
from turbomoe.insight.kv_pause import Pause, pause_path
from turbomoe.insight.kv_search import Measured, Pair
from turbomoe.models import load_model
from turbomoe.models.base import LoadedModel
from turbomoe.notices import board

AUTO = KVSettings("auto", "auto", 4, 32)
WISH = EngineSettings(ctx_size=CONTEXT, kv=AUTO)
LIMITS: dict[Pair, float] = {("tcq4", "tcq4"): inf, ("q8_0", "tq3"): 1.0, ("tcq2", "tcq2"): 1e-7}  # the last gives up
FROM = {"identity": "a model", "text": "a text"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """One full-attention layer among recurrent ones: both kinds of memory."""
    return load_model(write_chat_model(tmp_path_factory.mktemp("models") / "hybrid.gguf", family="qwen35"), WISH)


@pytest.fixture(autouse=True)
def always_due(monkeypatch: pytest.MonkeyPatch, state_home: Path) -> None:
    monkeypatch.setattr(kv_pause, "REST", 0)
    monkeypatch.setattr(kv_pause, "SHARE", 0)
    monkeypatch.setattr(board, "strict", True)
    monkeypatch.setattr(board, "counts", type(board.counts)())


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[int]]:
    """Count forwards from now on; the given one is interrupted from the keyboard."""
    real = ModelRunner.forward

    def watch(last: int | None) -> list[int]:
        starts: list[int] = []

        def forward(runner: ModelRunner, *rest, **named):
            starts.append(runner.memory.host_lengths[0])
            if len(starts) == last:
                raise KeyboardInterrupt
            return real(runner, *rest, **named)

        monkeypatch.setattr(ModelRunner, "forward", forward)
        return starts

    return watch


def run(model: LoadedModel, path: Path, given=FROM, limits=LIMITS) -> dict[Pair, Measured]:
    means = means_for(model, KVSettings("tcq2", "tcq2"))
    return measure(model, AUTO, means, check_ids(model, AUTO), limits, pause=Pause(path, given))


def broken_off(model: LoadedModel, path: Path, forwards, at: int = 12) -> None:
    means_for(model, KVSettings("tcq2", "tcq2"))
    forwards(at)
    with pytest.raises(KeyboardInterrupt):
        run(model, path)
    forwards(None)


# Of four caches in the windows and in the first judged chunk; of three, the last pair being given up, in later ones.
@pytest.mark.parametrize("at", [1, 6, 9, 11, 13, 16])
def test_it_goes_on_to_the_same_figures(model: LoadedModel, tmp_path: Path, forwards, at: int) -> None:
    whole = run(model, tmp_path / "whole")
    assert whole[("tcq2", "tcq2")].tokens == kv_check.CHUNK and whole[("tcq4", "tcq4")].tokens == CONTEXT - 37
    broken_off(model, tmp_path / "f", forwards, at)
    starts = forwards(None)
    assert run(model, tmp_path / "f") == whole
    behind = 0 if at <= 4 else 37 + 64 * max(0, (at - 6) // 3)
    assert starts[0] == min(starts) == behind, "what lies behind is not run again"
    assert board.counts["the check of KV types goes on"] == (behind > 0)


def test_whoever_is_broken_off_twice_loses_nothing_either(model: LoadedModel, tmp_path: Path, forwards) -> None:
    whole = run(model, tmp_path / "whole")
    broken_off(model, tmp_path / "f", forwards, 12)
    broken_off(model, tmp_path / "f", forwards, 7)
    starts = forwards(None)
    assert run(model, tmp_path / "f") == whole and starts[0] == 37 + 64 * 4


OTHERS = {
    "model": lambda: ({**FROM, "identity": "another"}, LIMITS),
    "text": lambda: ({**FROM, "text": "another"}, LIMITS),
    "limits": lambda: (FROM, {**LIMITS, ("tcq2", "tcq2"): 1.0}),
    "pairs": lambda: (FROM, {**LIMITS, ("q8_0", "q8_0"): 1.0}),
    "fewer pairs": lambda: (FROM, dict(list(LIMITS.items())[:2])),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_check_begins_at_its_beginning(model: LoadedModel, tmp_path: Path, forwards, name: str) -> None:
    given, limits = OTHERS[name]()
    whole = run(model, tmp_path / "whole", given, limits)
    broken_off(model, tmp_path / "f", forwards)
    starts = forwards(None)
    assert run(model, tmp_path / "f", given, limits) == whole and starts[0] == 0 and not board.counts


def test_other_codes_begin_at_the_beginning(model: LoadedModel, tmp_path: Path, forwards, monkeypatch) -> None:
    broken_off(model, tmp_path / "f", forwards)
    monkeypatch.setattr("turbomoe.kv.codecs.lloydmax.LloydMaxCodec.version", 77)
    starts = forwards(None)
    run(model, tmp_path / "f")
    assert starts[0] == 0


DAMAGED = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:-100],
    "one bit": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "another version": lambda data: data.replace(b'"version": "1"', b'"version": "0"'),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_file_that_cannot_be_used_is_told(model: LoadedModel, tmp_path: Path, forwards, name: str, capsys) -> None:
    whole = run(model, tmp_path / "whole")
    broken_off(model, tmp_path / "f", forwards)
    data = (tmp_path / "f").read_bytes()
    changed = DAMAGED[name](data)
    assert changed != data
    (tmp_path / "f").write_bytes(changed)
    starts = forwards(None)
    assert run(model, tmp_path / "f") == whole and starts[0] == 0
    assert (
        board.counts["a check that was broken off begins anew"] == 1 and str(tmp_path / "f") in capsys.readouterr().err
    )


def test_what_cannot_be_written_is_told_and_the_check_made(model: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "no folder").write_text("")
    assert run(model, tmp_path / "no folder" / "f") == run(model, tmp_path / "whole")
    assert board.counts["a check that is broken off will begin anew"] > 0


def test_it_is_written_now_and_then_only(model: LoadedModel, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(kv_pause, "REST", 1e6)
    run(model, tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_the_whole_of_auto(model: LoadedModel, forwards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In either of two passes; afterwards nothing of it is left."""
    wish = replace(WISH, kv=replace(AUTO, budget=1e-9))  # all of the ladder, then all of it beside bf16

    def elsewhere(name: str) -> Path:
        monkeypatch.setenv("TURBOMOE_HOME", str(tmp_path / name))
        return pause_path(model.identity)

    starts = forwards(None)
    elsewhere("whole")
    whole = resolve_kv_types(model, wish)
    first, second = (nth for nth in range(1, len(starts)) if (starts[nth - 1], starts[nth]) == (0, 37))
    for nth in (first, second):
        path = elsewhere(str(nth))
        forwards(nth + 3)
        with pytest.raises(KeyboardInterrupt):
            resolve_kv_types(model, wish)
        assert path.exists()
        again = forwards(None)
        found = resolve_kv_types(model, wish)
        assert (found, found.kv_choice) == (whole, whole.kv_choice) and again[0] == 37 and not path.exists()
    assert board.counts["the check of KV types goes on"] == 2


def test_a_check_of_other_windows_does_not_take_it_up(model: LoadedModel, forwards) -> None:
    resolve_kv_types(model, WISH)  # for the means
    forwards(9)
    with pytest.raises(KeyboardInterrupt):
        resolve_kv_types(model, replace(WISH, kv=replace(AUTO, recent=48)))
    again = forwards(None)
    resolve_kv_types(model, replace(WISH, kv=replace(AUTO, recent=40)))
    assert again[0] == 0


FORGED = {
    "nowhere": lambda header, arrays: header.update(at=-1),
    "far away": lambda header, arrays: header.update(at=10**9),
    "somewhere": lambda header, arrays: header.update(at="37"),
    "no sums": lambda header, arrays: header.update(shown=None),
    "fewer sums": lambda header, arrays: header["shown"].pop(),
    "other sums": lambda header, arrays: header["shown"].__setitem__(0, [[["a", "b"]], False]),
    "an array less": lambda header, arrays: arrays.popitem(),
    "another shape": lambda header, arrays: arrays.update({name: array[:1] for name, array in arrays.items()}),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_checksum_is_not_taken_for_sense(model: LoadedModel, tmp_path: Path, forwards, name: str) -> None:
    whole = run(model, tmp_path / "whole")
    broken_off(model, tmp_path / "f", forwards)
    header, arrays = load_arrays(tmp_path / "f", kv_pause.KIND, kv_pause.VERSION, kv_pause.LARGEST)
    FORGED[name](header, arrays)
    save_arrays(tmp_path / "f", kv_pause.KIND, kv_pause.VERSION, header, arrays)
    starts = forwards(None)
    assert run(model, tmp_path / "f") == whole and starts[0] == 0
    assert board.counts["a check that was broken off begins anew"] == 1
