"""Nothing falls back in silence: notices are counted, said once, and errors in strict mode unless expected."""

import pytest

from turbomoe.notices import Notice, NoticeBoard, StrictError

SLOW = Notice("a slow path", "the fast one is missing", "twice the time", "install it")


def test_a_notice_says_what_why_cost_and_cure_once(capsys):
    board = NoticeBoard()
    board.post(SLOW)
    board.post(SLOW)
    line = "note: a slow path: the fast one is missing. Cost: twice the time. To avoid: install it.\n"
    assert capsys.readouterr().err == line
    assert board.counts["a slow path"] == 2


def test_strict_turns_it_into_an_error():
    board = NoticeBoard()
    board.strict = True
    with pytest.raises(StrictError, match=r"a slow path\. the fast one is missing\. install it\."):
        board.post(SLOW)


def test_what_is_expected_is_told_but_never_an_error(capsys):
    board = NoticeBoard()
    board.strict = True
    board.post(Notice("tensors left out", "they are for images", expected=True))
    assert "tensors left out" in capsys.readouterr().err
