"""Thought and answer are told apart however the text was cut, and a tag inside an answer is the answer's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbomoe.engine.reasoning import CLOSE, OPEN, ReasoningSplitter

BITS = st.sampled_from([OPEN, CLOSE, "<", "</", "think>", "<thin", ">", " ", "\n", "so", "42", "é🙂", "<tool>"])
TEXTS = st.lists(BITS, max_size=12).map("".join)


def split(chunks: list[str], thinking: bool = False) -> tuple[str, str]:
    """(thought, answer) of a text that arrives in ``chunks``."""
    splitter = ReasoningSplitter(thinking)
    pieces = [piece for chunk in chunks for piece in splitter.push(chunk)] + splitter.finish()
    assert all(text for _, text in pieces), "an empty piece says nothing"
    kinds = [kind for kind, _ in pieces]
    assert kinds == sorted(kinds, reverse=True), "a thought stands in front"
    return "".join(t for kind, t in pieces if kind), "".join(t for kind, t in pieces if not kind)


def expected(text: str, thinking: bool) -> tuple[str, str]:
    """The same by looking at the whole text at once."""
    if not thinking:
        if not text.lstrip().startswith(OPEN):
            return "", text
        text = text.lstrip()[len(OPEN) :]
    thought, _, answer = text.partition(CLOSE)
    return thought, answer


CASES = {
    "hello": ("", "hello"),
    "<think>hm</think>42": ("hm", "42"),
    "\n <think>\nhm\n</think>\n\n42": ("\nhm\n", "\n\n42"),
    "<think></think>42": ("", "42"),
    "<think>no end": ("no end", ""),
    "a <think> tag</think>": ("", "a <think> tag</think>"),
    "<think>a</think>b<think>c</think>": ("a", "b<think>c</think>"),
    "<think>1 < 2 </thin </think>x": ("1 < 2 </thin ", "x"),
    "<thin": ("", "<thin"),
    "  ": ("", "  "),
    "": ("", ""),
}


@pytest.mark.parametrize(("text", "pieces"), CASES.items())
def test_thought_and_answer(text: str, pieces: tuple[str, str]) -> None:
    assert split([text]) == split(list(text)) == pieces == expected(text, False)


def test_a_thought_that_the_prompt_opened() -> None:
    assert split(["hm</th", "ink>42"], thinking=True) == ("hm", "42")
    assert split(["never ends"], thinking=True) == ("never ends", "")


@pytest.mark.parametrize("at", range(1, len("<think>hm</think>42")))
def test_a_tag_on_the_border_of_two_chunks(at: int) -> None:
    text = "<think>hm</think>42"
    assert split([text[:at], text[at:]]) == ("hm", "42")


@given(TEXTS, st.booleans(), st.data())
def test_any_cut_gives_the_same(text: str, thinking: bool, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert split(chunks, thinking) == expected(text, thinking)


def test_an_answer_is_passed_on_at_once() -> None:
    splitter = ReasoningSplitter()
    assert splitter.push("4") == [(False, "4")]
    assert splitter.push("<") == [(False, "<")]


def test_a_thought_is_passed_on_at_once_but_for_a_possible_tag() -> None:
    splitter = ReasoningSplitter(thinking=True)
    assert splitter.push("hm <") == [(True, "hm ")]
    assert splitter.push("3") == [(True, "<3")]
