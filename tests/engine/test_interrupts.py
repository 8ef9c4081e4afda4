"""Ctrl-C may fall between any two lines: nothing is lost but the answer under way, and the next one comes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tests.engine.scripted import smollm2_tokenizer
from tests.engine.test_conversation import KINDS, ask, conversation_for, hear, said
from turbomoe.engine.conversation import Conversation
from turbomoe.engine.session import load_session, save_session

TRACED = {
    "engine": {"slots.py", "engine.py", "conversation.py", "session.py", "runner.py"},
    "kv": {"pages.py", "cache.py"},
}


@contextmanager
def interrupt(line: int) -> Iterator[list[str]]:
    """Ctrl-C before the ``line``-th line that the engine runs inside; the list says where it fell, if it did."""
    left, fell = [line], []

    def trace(frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        path = Path(frame.f_code.co_filename)
        if path.name not in TRACED.get(path.parent.name, ()):
            return None
        if event == "line" and not fell:
            left[0] -= 1
            if left[0] == 0:
                fell.append(f"{path.name}:{frame.f_lineno}")
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        yield fell
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)


def goes_on(talk: Conversation) -> None:
    """The next question is answered, its slot comes back, and all memory is accounted for."""
    assert hear(talk, "Three?", "Third.") == "Third."
    assert said(talk)[-2:] == ["Three?", "Third."] and not talk.busy
    assert talk.engine.idle and len(talk.engine.slots) == talk.engine.settings.parallel
    talk.engine.runner.memory.check_integrity()
    everything = smollm2_tokenizer().apply_chat_template(talk.messages, tokenize=False)
    assert everything.startswith(talk.transcript().seen_text), "what the next prompt goes on from is what was said"


@pytest.mark.parametrize("kv", KINDS)
@pytest.mark.parametrize("line", [*range(1, 60), *range(60, 700, 7)])
def test_an_interrupt_in_an_answer(line: int, kv: str) -> None:
    talk = conversation_for(kv)
    hear(talk, "One?", "First answer.")
    events = ask(talk, "Two?", "Second.")
    with interrupt(line) as fell:
        list(events)
    assert fell or line > 400
    events.close()
    assert said(talk)[:2] == ["One?", "First answer."]
    goes_on(talk)


@pytest.mark.parametrize("kv", KINDS)
def test_an_interrupt_while_an_answer_is_ended(kv: str) -> None:
    """What had been said before stays, and can be saved: at each of the lines in turn, until all are behind."""
    line, fell = 0, ["once"]
    while fell:
        line += 1
        talk = conversation_for(kv)
        hear(talk, "One?", "First answer.")
        events = ask(talk, "Two?", "Second.")
        next(events)
        with interrupt(line) as fell:
            events.close()
        talk.give_up()
        assert not talk.busy and said(talk)[:2] == ["One?", "First answer."]
        goes_on(talk)
    assert line > 40


@pytest.mark.parametrize("end", ["asked again", "given up"])
def test_an_answer_that_was_given_up_does_not_come_back(end: str) -> None:
    talk = conversation_for("tq3")
    first = ask(talk, "One?", "First answer.")
    next(first)
    if end == "given up":
        talk.give_up()
    second = ask(talk, "Two?", "Second.")
    next(second)
    assert talk.busy
    first.close()
    assert talk.busy, "the second answer is still on its way"
    list(second)
    assert said(talk) == ["Two?", "Second."] and not talk.busy


def test_a_second_interrupt_while_the_first_wipes_a_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = conversation_for("tq3")
    hear(talk, "One?", "First answer.")
    memory = talk.engine.runner.memory
    forward, release = talk.engine.runner.forward, memory.release

    def pressed(*_: object) -> None:
        talk.engine.runner.forward = forward  # type: ignore[method-assign]
        raise KeyboardInterrupt

    def pressed_again(slot: int) -> None:
        memory.release = release  # type: ignore[method-assign]
        raise KeyboardInterrupt

    talk.engine.runner.forward = pressed  # type: ignore[assignment]
    memory.release = pressed_again  # type: ignore[method-assign]
    events = ask(talk, "Two?", "Second.")
    with pytest.raises(KeyboardInterrupt):
        list(events)
    goes_on(talk)


@pytest.mark.parametrize("kv", KINDS)
def test_an_interrupt_while_a_session_is_taken_up(tmp_path: Path, kv: str) -> None:
    """The slot holds what it says it holds, at whatever line."""
    first = conversation_for(kv)
    hear(first, "One?", "First answer.")
    save_session(first.engine, first, tmp_path / "s")
    line, fell = 0, ["once"]
    while fell:
        line += 1
        talk = conversation_for(kv)
        hear(talk, "Zero?", "A zeroth answer, longer than that.")
        with interrupt(line) as fell:
            load_session(talk.engine, talk, tmp_path / "s")
        slots, memory = talk.engine.slots, talk.engine.runner.memory
        talk.engine.find_lost_slots()
        assert len(slots.known(0)) in (0, memory.host_lengths[0]), fell
        hear(talk, "Two?", "Second.")
    assert line > 40
