"""What a worker's heartbeats report of its load: taken off the event loop, with a deadline."""

import asyncio
import logging
from collections.abc import Callable

from janus_proto.v1 import control_pb2
from janus_server.comm.work_thread import WorkThread

logger = logging.getLogger(__name__)


class LoadReport:
    """Asks `take` for the load in a thread, as it may wait for a device; one call at a time."""

    def __init__(self, take: Callable[[], control_pb2.ExpertLoad]) -> None:
        self._take = take
        self._taking: asyncio.Task[control_pb2.ExpertLoad] | None = None
        self._has_complained = False

    async def within(self, deadline_s: float) -> control_pb2.ExpertLoad | None:
        """The load; None where `take` fails or needs longer. What comes late is left to the next.

        The first failure is logged, whatever it is; none is raised.
        """
        if self._taking is None:
            thread = WorkThread(self._take, name="reporting the load")
            self._taking = asyncio.create_task(thread.result(), name="load report")
        done, _ = await asyncio.wait({self._taking}, timeout=deadline_s)
        if not done:
            self._complain(f"it took longer than {deadline_s:g} s", None)
            return None
        taken, self._taking = self._taking, None
        error = taken.exception()
        if error is not None:
            self._complain("it failed", error)
            return None
        return taken.result()

    def _complain(self, reason: str, error: BaseException | None) -> None:
        if not self._has_complained:
            self._has_complained = True
            logger.warning("heartbeats go on without the load: %s", reason, exc_info=error)
