"""``turbomoe chat``: commands, several turns on one memory, Ctrl-C, a full context and the way on, JSON lines."""

from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.tiny_chat import Done, Says, Turbomoe
from turbomoe.cli import main as cli
from turbomoe.cli.chat import HELP, WAY_ON, interrupts

GREEDY = ("--temp", "0")
Talk = Callable[..., Done]


@pytest.fixture
def talk(turbomoe: Turbomoe, says: Says, monkeypatch: pytest.MonkeyPatch) -> Talk:
    """Pipe lines into ``turbomoe chat``."""

    def run(*lines: str, flags: tuple[object, ...] = ()) -> Done:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("".join(f"{x}\n" for x in lines).encode())))
        return turbomoe("chat", "-m", says.path, *GREEDY, *flags)

    return run


def answers(done: Done) -> list[dict]:
    return [json.loads(line) for line in done.out.splitlines()]


def test_answers_alone_are_on_standard_output(talk: Talk, says: Says) -> None:
    says("First.", "Second.")
    done = talk("One?", "", "Two?")
    assert (done.code, done.out) == (0, "First.\nSecond.\n")
    table, _, greeting, first, second = done.err.splitlines()
    assert table.startswith("device")
    assert greeting == "scripted, 256 tokens of context. /help shows the commands."
    assert "(0 reused)" in first and "(0 reused)" not in second


@pytest.mark.parametrize("kv", ["bf16", "tq3"])
def test_each_turn_goes_on_from_the_memory_of_the_last(talk: Talk, says: Says, kv: str) -> None:
    says("First.", "Second.", "Third.")
    turns = answers(talk("One?", "Two?", "Three?", flags=("--json", "-ctk", kv, "-ctv", kv)))
    assert [turn["text"] for turn in turns] == ["First.", "Second.", "Third."]
    reused = [turn["reused_tokens"] for turn in turns]
    assert reused == [0, *(t["prompt_tokens"] + t["generated_tokens"] - 1 for t in turns[:-1])]
    assert {turn["kv_type_k"] for turn in turns} == {kv}
    assert all(turn["finish"] == "stop" for turn in turns)


def test_help_lists_every_command(talk: Talk) -> None:
    done = talk("/help")
    assert HELP in done.err and done.out == ""
    for name in ("/help", "/clear", "/drop", "/retry", "/think", "/stats", "/exit"):
        assert f"\n{name}" in f"\n{HELP}"


@pytest.mark.parametrize("leave", ["/exit", "/quit", "  /exit now"])
def test_leaving(talk: Talk, says: Says, leave: str) -> None:
    says("First.")
    assert talk("One?", leave, "Two?").out == "First.\n"


def test_an_unknown_command_is_not_a_question_but_a_path_is(talk: Talk, says: Says) -> None:
    says("A folder.")
    done = talk("/hlep", "/usr/bin is what?")
    assert "There is no command /hlep; /help lists them." in done.err
    assert done.out == "A folder.\n"


def test_several_lines_are_one_question(talk: Talk, says: Says, monkeypatch) -> None:
    says("Fine.")
    seen = []
    ask = "turbomoe.engine.conversation.Conversation.ask"
    from turbomoe.engine.conversation import Conversation

    original = Conversation.ask
    monkeypatch.setattr(ask, lambda self, text, *more: seen.append(text) or original(self, text, *more))
    talk("one\\", "two")
    assert seen == ["one\ntwo"]


def test_retry_answers_again_without_the_first_answer(talk: Talk, says: Says) -> None:
    says("First.", "Better.")
    done = talk("/retry", "One?", "/retry", flags=("--json",))
    first, again = answers(done)
    assert "There is nothing to answer again." in done.err
    assert (first["text"], again["text"]) == ("First.", "Better.")
    assert first["prompt_tokens"] == again["prompt_tokens"] == again["reused_tokens"] + 1


def test_clear_starts_anew_and_keeps_the_system_message(talk: Talk, says: Says) -> None:
    says("First.", "Second.")
    first, second = answers(talk("One?", "/clear", "One?", flags=("--json", "--system", "Be brief.")))
    assert first["prompt_tokens"] == second["prompt_tokens"]


def test_statistics_are_switched_off_and_on(talk: Talk, says: Says) -> None:
    says("a", "b", "c")
    done = talk("One?", "/stats", "Two?", "/stats", "Three?")
    assert done.err.count(" generated") == 2
    assert done.err.index("Statistics are off.") < done.err.index("Statistics are on.")


def test_thinking_is_switched_where_there_is_a_switch(talk: Talk, says: Says) -> None:
    done = talk("/think", "/think on")
    assert "Write /think on or /think off." in done.err and "This model has no switch for thinking." in done.err
    says.template("{{ messages[-1].content }}{% if enable_thinking %}<think>\n{% endif %}")
    says("Hm.</think>42", "43")
    done = talk("/think on", "One?", "/think off", "Two?", flags=("--json",))
    assert [(a["reasoning"], a["text"]) for a in answers(done)] == [("Hm.", "42"), ("", "43")]
    assert "Thinking is on." in done.err and "Thinking is off." in done.err


def test_a_full_context_shows_the_way_on(talk: Talk, says: Says) -> None:
    says("word " * 15, "At last.")
    done = talk("One?", "word " * 25, "/drop", "/retry", "/drop", "/drop", flags=("-c", "80"))
    assert done.code == 0
    assert done.out.splitlines()[-1] == "At last."
    lines = done.err.splitlines()
    refused = next(i for i, line in enumerate(lines) if line.startswith("The prompt has "))
    assert "the context holds 80. At least one token of the answer must fit" in lines[refused]
    assert lines[refused + 1 : refused + 3] == [WAY_ON, "Forgot the oldest exchange."]
    assert lines[-2:] == ["Forgot the oldest exchange.", "There is nothing to forget."]


def test_an_answer_cut_by_the_context_shows_the_way_on(talk: Talk, says: Says) -> None:
    says("word " * 60)
    done = talk("One?", flags=("-c", "48"))
    assert f"The context is full. {WAY_ON}" in done.err and ", the context is full]" in done.err


def test_a_refused_question_is_a_json_line_too(talk: Talk, says: Says) -> None:
    says("Yes.")
    refused, answered = answers(talk("word " * 60, "One?", flags=("-c", "60", "--json")))
    assert refused.keys() == {"error"} and "the context holds 60" in refused["error"]
    assert answered["text"] == "Yes."


def test_a_template_s_refusal_is_not_called_a_full_context(talk: Talk, says: Says) -> None:
    says.template("{{ raise_exception('never on a Sunday') }}")
    done = talk("One?")
    assert done.code == 0 and "never on a Sunday" in done.err and "/drop" not in done.err


def interrupt_at(says: Says, monkeypatch: pytest.MonkeyPatch, *calls: int) -> None:
    """Press Ctrl-C inside these forward passes."""
    shell, forward = says.model.shell, says.model.shell.forward

    def pressed(*arguments, **more):
        if len(shell.calls) in calls:
            signal.raise_signal(signal.SIGINT)
        return forward(*arguments, **more)

    monkeypatch.setattr(shell, "forward", pressed)


def test_ctrl_c_stops_the_answer_and_keeps_chat_and_memory(talk: Talk, says: Says, monkeypatch) -> None:
    says("one two three four five", "Fine.")
    interrupt_at(says, monkeypatch, 2)
    done = talk("Count.", "Two?", flags=("--json",))
    stopped, answered = answers(done)
    assert done.code == 0
    assert (stopped["text"], stopped["finish"], answered["text"]) == ("one two three", "cancelled", "Fine.")
    assert answered["reused_tokens"] == stopped["prompt_tokens"] + 2


def test_a_second_ctrl_c_breaks_off_the_step_and_the_chat_goes_on(talk: Talk, says: Says, monkeypatch) -> None:
    says("one two three four five", "Fine.")
    monkeypatch.setattr("turbomoe.engine.conversation.Conversation.stop", lambda self: None)  # a step without end
    interrupt_at(says, monkeypatch, 2, 3)
    done = talk("Count.", "Two?")
    assert (done.code, done.out) == (0, "one two three\nFine.\n")
    assert ", stopped]" in done.err


def test_stopped_before_the_first_word_a_question_can_be_asked_again(talk: Talk, says: Says, monkeypatch) -> None:
    says("unheard", "Here.")
    interrupt_at(says, monkeypatch, 0)
    monkeypatch.setattr("turbomoe.engine.sequence.Sequence.accept", _once_nothing())
    stopped, answered = answers(talk("One?", "/retry", flags=("--json",)))
    assert (stopped["text"], stopped["generated_tokens"]) == ("", 0)
    assert (answered["text"], answered["prompt_tokens"]) == ("Here.", stopped["prompt_tokens"])


def _once_nothing():
    """The first step draws nothing, as a chunk in the middle of a long prompt."""
    from turbomoe.engine.request import Event
    from turbomoe.engine.sequence import Sequence

    accept, calls = Sequence.accept, []

    def first(self, token, stop_ids, ctx_size):
        calls.append(token)
        return Event(self.request_id) if len(calls) == 1 else accept(self, token, stop_ids, ctx_size)

    return first


def test_ctrl_c_outside_an_answer_is_what_it_was() -> None:
    with interrupts(lambda: None):
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_model_without_a_template_is_refused_at_once(talk: Talk, says: Says) -> None:
    says.template(None)
    done = talk("One?")
    assert done.code == cli.ERROR and done.out == ""
    assert "scripted has no chat template" in done.err and "turbomoe run" in done.err


def test_text_that_is_not_utf8_ends_the_chat_with_a_sentence(turbomoe: Turbomoe, says: Says, monkeypatch) -> None:
    says("First.")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"One?\n\xff\n")))
    done = turbomoe("chat", "-m", says.path, *GREEDY)
    assert (done.code, done.out) == (cli.ERROR, "First.\n")
    assert done.err.splitlines()[-1].startswith("standard input is not UTF-8 text. Byte 5 is 0xff")


def test_a_real_file_through_the_whole_path(turbomoe: Turbomoe, chat_model: Path, monkeypatch, state_home) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Why?\nAnd?\n")))
    flags = ("-n", "4", "-ctk", "tq3", "-ctv", "tq2", "--kv-sink", "4", "--kv-recent", "8", "--json")
    done = turbomoe("chat", "-m", chat_model, *GREEDY, *flags)
    first, second = answers(done)
    assert second["reused_tokens"] == first["prompt_tokens"] + first["generated_tokens"] - 1
    assert "calibrating key and value means, once for this model..." in done.err
