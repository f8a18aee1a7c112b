import itertools
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from janus_server.endpoint.stop_strings import StopMatcher


def first_whole(text: str, stops: Sequence[str]) -> tuple[str, str]:
    """(text before the match, matched stop) of the match that ends first; the oracle."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            longest = max(ended, key=len)
            return text[: end - len(longest)], longest
    return text, ""


def chunkings(text: str) -> Iterator[list[str]]:
    """Every way to cut a text into pieces."""
    for cuts in itertools.product((False, True), repeat=max(len(text) - 1, 0)):
        borders = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(text)]
        yield [text[a:b] for a, b in itertools.pairwise(borders)]


def check(pieces: Sequence[str], stops: Sequence[str]) -> None:
    matcher = StopMatcher(stops)
    before, matched = first_whole("".join(pieces), stops)
    shown = ""
    for piece in pieces:
        shown += matcher.feed(piece)
        assert before.startswith(shown)
        if matcher.matched:
            break
    assert matcher.matched == matched
    assert shown + matcher.finish() == before
    if matched:
        assert shown == before


STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


@given(text=st.text("ab", max_size=8), stops=STOPS)
def test_all_chunkings_of_short_texts(text: str, stops: list[str]) -> None:
    for pieces in chunkings(text):
        check(pieces, stops)


@given(pieces=st.lists(st.text("abcé😀", max_size=6)), stops=STOPS)
def test_long_texts(pieces: list[str], stops: list[str]) -> None:
    check(pieces, stops)


@pytest.mark.parametrize(
    ("pieces", "stops", "shown", "matched"),
    [
        (["hello"], [], "hello", ""),
        (["a", "b", "c", "d"], ["bc"], "a", "bc"),
        # The stop string that is complete first ends the text, in one piece or in many.
        (["abcd"], ["abcd", "bc"], "a", "bc"),
        (["abc", "d"], ["abcd", "bc"], "a", "bc"),
        (["xabc"], ["c", "abc"], "x", "abc"),
        (["\n", "\nx"], ["\n\n"], "", "\n\n"),
        (["aab"], ["ab"], "a", "ab"),
    ],
)
def test_cases(pieces: list[str], stops: list[str], shown: str, matched: str) -> None:
    matcher = StopMatcher(stops)
    assert "".join(matcher.feed(piece) for piece in pieces if not matcher.matched) == shown
    assert matcher.matched == matched


def test_holds_back_no_more_than_may_be_a_stop() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.feed("the E") == "the "
    assert matcher.feed("N") == ""
    assert matcher.feed("E") == "EN"
    assert matcher.finish() == "E"
    assert matcher.finish() == ""
