"""Stop strings: whatever the pieces, the text before the first stop comes out, whole and once."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from turbomoe.engine.stops import StopMatcher

LETTERS = st.text("ab|", min_size=1, max_size=4)


def split(text: str, cuts: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(c % (len(text) + 1) for c in cuts)})
    return [text[a:b] for a, b in pairwise(edges)]


@given(st.text("ab|", max_size=30), st.lists(LETTERS, max_size=3), st.lists(st.integers(0, 30), max_size=8))
def test_pieces_give_what_the_whole_text_gives(text, stops, cuts):
    matcher = StopMatcher(stops)
    shown, stopped = "", False
    for piece in split(text, cuts):
        part, stopped = matcher.push(piece)
        shown += part
        assert not any(stop in shown for stop in stops), "a stop string was shown"
        if stopped:
            break
    shown += matcher.finish()
    hits = [text.find(stop) for stop in stops if stop in text]
    if not hits:
        assert (shown, stopped) == (text, False)
        return
    # The first piece that completes any stop decides; among stops complete by then, the earliest start wins.
    assert stopped
    assert text.startswith(shown)
    assert any(text.startswith(stop, len(shown)) for stop in stops)


def test_without_stops_nothing_is_held_back():
    matcher = StopMatcher(())
    assert matcher.push("abc") == ("abc", False)
    assert matcher.finish() == ""


def test_only_a_possible_start_is_held_back():
    matcher = StopMatcher(("</end>",))
    assert matcher.push("hello </e") == ("hello ", False)
    assert matcher.push("m>") == ("</em>", False)
