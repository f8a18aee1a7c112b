"""What is said before a step, as words: announcements, and the layouts that follow from them.

Readers trust nobody: counts beyond what the peer registered would become allocations. A peer whose
words make no sense is given up like one that died.
"""

from collections.abc import Sequence

from janus_server.comm.config import MAX_LANES
from janus_server.comm.sequencing import Announcement, StepLayout
from janus_server.errors import PeerLostError

ANNOUNCEMENT_WORDS = 2 + MAX_LANES
"""The kind of announcement, the number of lanes, and the tokens of each lane."""


def layout_words_of(num_attention: int) -> int:
    """Words of a layout: what comes next, then for each attention worker its lanes."""
    return 1 + num_attention * (1 + MAX_LANES)


def write_announcement(kind: Announcement, lane_tokens: Sequence[int] = ()) -> list[int]:
    """An attention worker's announcement to the first expert worker."""
    return [kind, *_write_lanes(lane_tokens)]


def read_announcement(
    words: Sequence[int], *, rank: int, max_tokens: int
) -> tuple[Announcement, tuple[int, ...]]:
    """Read what attention worker `rank`, of up to `max_tokens` tokens a step, announces.

    Raises PeerLostError that names it where its words make no sense.
    """
    try:
        kind = Announcement(words[0])
        lane_tokens = _read_lanes(words[1:], max_tokens)
        if (kind is Announcement.WORK) != bool(lane_tokens):
            raise ValueError(f"{kind.name} with {len(lane_tokens)} lanes")
    except ValueError as error:
        raise PeerLostError(f"attention worker {rank} was given up: it announced {error}") from None
    return kind, lane_tokens


def write_layout(kind: Announcement, layout: StepLayout | None, *, num_attention: int) -> list[int]:
    """What the first expert worker tells the others."""
    lane_tokens = layout.lane_tokens if layout else {}
    rows = [_write_lanes(lane_tokens.get(rank, ())) for rank in range(num_attention)]
    return [kind, *(word for row in rows for word in row)]


def read_layout(
    words: Sequence[int], *, max_tokens: Sequence[int]
) -> tuple[Announcement, StepLayout | None]:
    """Read what the first expert worker says comes next; a layout comes with WORK alone.

    `max_tokens` is, for each attention worker, how many tokens a step of it may have. Raises
    PeerLostError where the words make no sense.
    """
    rows = [words[1 + at :] for at in range(0, len(words) - 1, 1 + MAX_LANES)]
    try:
        kind = Announcement(words[0])
        read = [_read_lanes(row, most) for row, most in zip(rows, max_tokens, strict=True)]
        lane_tokens = {rank: lanes for rank, lanes in enumerate(read) if lanes}
        if (kind is Announcement.WORK) != bool(lane_tokens):
            raise ValueError(f"{kind.name} with {len(lane_tokens)} participants")
    except ValueError as error:
        raise PeerLostError(f"the first expert worker was given up: it said {error}") from None
    return kind, StepLayout(lane_tokens=lane_tokens) if lane_tokens else None


def _write_lanes(lane_tokens: Sequence[int]) -> list[int]:
    unused = MAX_LANES - len(lane_tokens)
    assert unused >= 0, f"{len(lane_tokens)} lanes"
    return [len(lane_tokens), *lane_tokens, *[0] * unused]


def _read_lanes(words: Sequence[int], max_tokens: int) -> tuple[int, ...]:
    num_lanes = words[0]
    if not 0 <= num_lanes <= MAX_LANES:
        raise ValueError(f"{num_lanes} lanes; there are at most {MAX_LANES}")
    lane_tokens = tuple(words[1 : 1 + num_lanes])
    if min(lane_tokens, default=0) < 0 or sum(lane_tokens) > max_tokens:
        raise ValueError(f"lanes of {lane_tokens} tokens; it registered {max_tokens} a step")
    return lane_tokens
