"""How many bytes the calls of a connection can need.

Invariant: what an honest client sends is always explained. It sends headers of bounded size for
each call; of a body, no more than the windows of HTTP/2 before the handler reads, and one request
for each read; little in answer to what it gets; and a few pings.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass

_WINDOW_BYTES = 2**16
"""What a client may send on a stream, and on a connection, as long as nobody reads."""
_SPARE_BYTES = 2 * _WINDOW_BYTES
"""What a connection may bring without a reason, such as the rest of a body that was cancelled."""
_CALL_OVERHEAD_BYTES = 2**10
"""Frames that begin and end a call, beside its headers and its body."""
_CHATTER_BYTES_PER_S = 2**10
"""Pings and the like."""
_ANSWER_RATIO = 2
"""What a client may confirm with, in bytes for each byte that it gets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """What has happened on a connection since it began."""

    received_bytes: int = 0
    """Read by gRPC."""
    sent_bytes: int = 0
    num_streams: int = 0
    """Calls whose headers have begun."""
    num_reads: int = 0
    """Reads of requests that have ended, with or without a request."""
    time_s: float = 0.0


class ByteBudget:
    """How much of what a connection brought nothing explains."""

    def __init__(self, start: Traffic, *, max_metadata_bytes: int, max_request_bytes: int) -> None:
        self.unexplained_bytes = 0.0
        self.last = start
        self._stream_bytes = max_metadata_bytes + _WINDOW_BYTES + _CALL_OVERHEAD_BYTES
        self._max_request_bytes = max_request_bytes

    def add(self, now: Traffic, *, num_reading: int) -> bool:
        """Whether the connection is within its bounds, while `num_reading` reads wait."""
        last, self.last = self.last, now
        explained = (
            (now.num_streams - last.num_streams) * self._stream_bytes
            + (now.num_reads - last.num_reads) * self._max_request_bytes
            + (now.sent_bytes - last.sent_bytes) * _ANSWER_RATIO
            + (now.time_s - last.time_s) * _CHATTER_BYTES_PER_S
        )
        received = now.received_bytes - last.received_bytes
        self.unexplained_bytes = max(0.0, self.unexplained_bytes + received - explained)
        return self.unexplained_bytes <= _SPARE_BYTES + num_reading * self._max_request_bytes


class Reads:
    """The reads of requests, by the peer as gRPC names it."""

    def __init__(self) -> None:
        self.num_waiting: Counter[str] = Counter()
        self.num_ended: Counter[str] = Counter()

    @contextlib.contextmanager
    def reading(self, peer: str) -> Iterator[None]:
        """Wraps one read."""
        self.num_waiting[peer] += 1
        try:
            yield
        finally:
            self.num_waiting[peer] -= 1
            self.num_ended[peer] += 1

    def forget_all_but(self, peers: Set[str]) -> None:
        """Forget peers whose connections have gone."""
        for peer in self.num_ended.keys() - peers:
            if not self.num_waiting[peer]:
                del self.num_waiting[peer], self.num_ended[peer]
