import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from janus_server.comm.config import MAX_LANES
from janus_server.comm.sequencing import Announcement, StepLayout
from janus_server.comm.step_words import (
    ANNOUNCEMENT_WORDS,
    layout_words_of,
    read_announcement,
    read_layout,
    write_announcement,
    write_layout,
)
from janus_server.errors import PeerLostError

WORK, IDLE, CLOSE = Announcement.WORK, Announcement.IDLE, Announcement.CLOSE
MAX_TOKENS = 10
# Small numbers are likely to pass the first checks.
word = st.one_of(st.integers(-2, 12), st.integers(-(2**63), 2**63 - 1))
lanes = st.lists(st.integers(0, 2), min_size=1, max_size=MAX_LANES).map(tuple)


def test_words_by_hand() -> None:
    assert write_announcement(WORK, [7, 3]) == [0, 2, 7, 3, 0, 0]
    assert write_announcement(CLOSE) == [2, 0, 0, 0, 0, 0]
    layout = StepLayout(lane_tokens={1: (4,)})
    assert write_layout(WORK, layout, num_attention=2) == [0, *[0] * 5, 1, 4, 0, 0, 0]
    assert write_layout(IDLE, None, num_attention=1) == [1, 0, 0, 0, 0, 0]


@settings(derandomize=True)
@given(st.dictionaries(st.integers(0, 3), lanes, min_size=1))
def test_what_is_written_is_read(lane_tokens: dict[int, tuple[int, ...]]) -> None:
    layout = StepLayout(lane_tokens=dict(sorted(lane_tokens.items())))
    words = write_layout(WORK, layout, num_attention=4)
    assert len(words) == layout_words_of(4)
    assert read_layout(words, max_tokens=[MAX_TOKENS] * 4) == (WORK, layout)
    for rank, tokens in lane_tokens.items():
        words = write_announcement(WORK, tokens)
        assert len(words) == ANNOUNCEMENT_WORDS
        assert read_announcement(words, rank=rank, max_tokens=MAX_TOKENS) == (WORK, tokens)
    for kind in (IDLE, CLOSE):
        words = write_announcement(kind)
        assert read_announcement(words, rank=0, max_tokens=MAX_TOKENS) == (kind, ())
        words = write_layout(kind, None, num_attention=4)
        assert read_layout(words, max_tokens=[MAX_TOKENS] * 4) == (kind, None)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([3, 0, 0, 0, 0, 0], "3 is not a valid Announcement"),
        ([-1, 0, 0, 0, 0, 0], "-1 is not a valid Announcement"),
        ([0, 0, 0, 0, 0, 0], "WORK with 0 lanes"),
        ([1, 1, 4, 0, 0, 0], "IDLE with 1 lanes"),
        ([0, 5, 1, 1, 1, 1], "5 lanes; there are at most 4"),
        ([0, -1, 1, 0, 0, 0], "-1 lanes"),
        ([0, 1, -1, 0, 0, 0], "lanes of (-1,) tokens; it registered 10 a step"),
        ([0, 2, 2**62, -(2**62), 0, 0], "it registered 10 a step"),
        ([0, 1, 11, 0, 0, 0], "lanes of (11,) tokens; it registered 10 a step"),
        ([0, 2, 6, 5, 0, 0], "lanes of (6, 5) tokens; it registered 10 a step"),
    ],
)
def test_a_peer_whose_words_make_no_sense_is_named(words: list[int], sentence: str) -> None:
    with pytest.raises(PeerLostError) as raised:
        read_announcement(words, rank=3, max_tokens=MAX_TOKENS)
    assert str(raised.value).startswith("attention worker 3 was given up: it announced ")
    assert sentence in str(raised.value)
    with pytest.raises(PeerLostError, match="the first expert worker was given up: it said "):
        read_layout(words, max_tokens=[MAX_TOKENS])


@settings(derandomize=True, max_examples=500)
@given(st.lists(word, min_size=ANNOUNCEMENT_WORDS, max_size=ANNOUNCEMENT_WORDS))
def test_whatever_a_peer_says_counts_stay_bounded(words: list[int]) -> None:
    try:
        kind, lane_tokens = read_announcement(words, rank=0, max_tokens=MAX_TOKENS)
    except PeerLostError:
        with pytest.raises(PeerLostError):
            read_layout(words, max_tokens=[MAX_TOKENS])
        return
    assert (kind is WORK) == bool(lane_tokens)
    assert len(lane_tokens) <= MAX_LANES
    assert all(tokens >= 0 for tokens in lane_tokens)
    assert sum(lane_tokens) <= MAX_TOKENS
