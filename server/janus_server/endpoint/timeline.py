"""The line that the log has of each request."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator

from janus_proto.v1 import inference_pb2
from janus_server.errors import JanusError

logger = logging.getLogger(__name__)


class Timeline:
    """What the log says of a request."""

    def __init__(self) -> None:
        self.request_id = "without a usable id"
        """Until there is one that is known not to garble the log."""
        self._start_s = time.monotonic()
        self._first_s: float | None = None
        self._last = inference_pb2.GenerateResponse()

    @property
    def total_ms(self) -> float:
        """Time since the request came."""
        return 1e3 * (time.monotonic() - self._start_s)

    def note(self, response: inference_pb2.GenerateResponse) -> None:
        """Take in what the client is sent."""
        if self._first_s is None:
            self._first_s = time.monotonic()
        self._last = response

    def __str__(self) -> str:
        usage = self._last.usage
        reason = inference_pb2.FinishReason.Name(self._last.finish_reason)
        ttft_s = (self._first_s or time.monotonic()) - self._start_s
        return (
            f"{reason.removeprefix('FINISH_REASON_').lower()}, {usage.prompt_tokens} prompt and "
            f"{usage.completion_tokens} completion tokens, TTFT {1e3 * ttft_s:.0f} ms, "
            f"total {self.total_ms:.0f} ms"
        )


@contextlib.contextmanager
def logged_end() -> Iterator[Timeline]:
    """Log one line when the request that runs within has ended, however it did."""
    timeline = Timeline()
    outcome = "failed"
    try:
        yield timeline
        outcome = str(timeline)
    except JanusError as error:
        outcome = f"failed after {timeline.total_ms:.0f} ms: {error}"
        raise
    except (asyncio.CancelledError, GeneratorExit):
        outcome = f"cancelled after {timeline.total_ms:.0f} ms, by its client or its deadline"
        raise
    finally:
        logger.info("request %s: %s", timeline.request_id, outcome)
