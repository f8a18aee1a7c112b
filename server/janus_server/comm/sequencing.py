"""Which attention workers take part in the next step. Pure; run by the first expert worker.

Attention workers announce work (token counts per lane), idleness or their end. A step starts as
soon as a worker has work and every participant of the step before has announced something again. So
busy workers keep step with each other, and idle workers cost nothing. A worker that gets work joins
at the next step boundary.
"""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


class Announcement(enum.IntEnum):
    """What an attention worker may say between steps; the numbers are sent over the network."""

    WORK = 0
    IDLE = 1
    CLOSE = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class StepLayout:
    """Who sends how many tokens in a step."""

    lane_tokens: Mapping[int, tuple[int, ...]]
    """Rank of a participant -> tokens in each of its lanes; ranks ascend."""

    @property
    def num_lanes(self) -> int:
        """Lanes of the participant that has most."""
        return max(len(tokens) for tokens in self.lane_tokens.values())

    def tokens_of(self, lane: int) -> list[tuple[int, int]]:
        """(rank, tokens) of each participant that has tokens in `lane`, ranks ascending."""
        return [
            (rank, tokens[lane])
            for rank, tokens in self.lane_tokens.items()
            if lane < len(tokens) and tokens[lane] > 0
        ]


class StepSequencer:
    """Collects announcements and says when, and with whom, a step starts."""

    def __init__(self, attention_ranks: Sequence[int]) -> None:
        self._open = set(attention_ranks)
        self._awaited: set[int] = set()
        self._pending: dict[int, tuple[int, ...]] = {}

    @property
    def closed(self) -> bool:
        """Whether every attention worker has announced its end."""
        return not self._open

    @property
    def awaited(self) -> frozenset[int]:
        """Participants of the last step that have announced nothing since."""
        return frozenset(self._awaited)

    def offer(self, rank: int, kind: Announcement, lane_tokens: Sequence[int] = ()) -> None:
        """Take in an announcement."""
        assert rank in self._open, f"rank {rank} announced something after its end"
        self._awaited.discard(rank)
        if kind is Announcement.WORK:
            self._pending[rank] = tuple(lane_tokens)
        elif kind is Announcement.CLOSE:
            self._open.discard(rank)

    def next_step(self) -> StepLayout | None:
        """The layout of a step that can start now, or None."""
        if not self._pending or self._awaited:
            return None
        layout = StepLayout(lane_tokens=dict(sorted(self._pending.items())))
        self._awaited = set(self._pending)
        self._pending = {}
        return layout
