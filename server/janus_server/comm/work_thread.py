"""Blocking work in a thread of its own, off the event loop."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from janus_server.errors import PeerLostError

T = TypeVar("T")

_ABANDON_GRACE_S = 2.0
"""How long work may take to notice that its peers were given up, in seconds."""


class WorkThread(Generic[T]):
    """Blocking `work` off the event loop, such as loading, meeting peers or running steps.

    Unlike the loop's own threads, this one keeps no process from ending when it is told to stop.
    """

    def __init__(self, work: Callable[[], T], *, name: str) -> None:
        """Start it; `name` says in messages what it is."""
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[T] = self._loop.create_future()
        # Reads the exception, so that asyncio does not complain if nobody waits for it.
        self._done.add_done_callback(asyncio.Future.exception)
        threading.Thread(target=self._run, args=(work,), name=name, daemon=True).start()

    async def result(self) -> T:
        """Wait for the end; raises what the work raises. May be cancelled, the work goes on."""
        await asyncio.wait([self._done])
        return self._done.result()

    async def end(self, *, grace_s: float, abandon: Callable[[], None]) -> None:
        """Wait for the end of work that was told to stop; raises what the work raises.

        After `grace_s` seconds `abandon` is called, which should make it raise; PeerLostError is
        raised then, and also where the work goes on even so.
        """
        done, _ = await asyncio.wait([self._done], timeout=grace_s)
        if not done:
            abandon()
            done, _ = await asyncio.wait([self._done], timeout=_ABANDON_GRACE_S)
            sentence = f"{self._name} did not end within {grace_s:g} s of the request to stop"
            raise PeerLostError(
                sentence if done else f"{sentence}, nor when its peers were given up"
            )
        self._done.result()

    def _run(self, work: Callable[[], T]) -> None:
        try:
            result = work()
        except Exception as error:
            self._settle(self._done.set_exception, error)
        else:
            self._settle(self._done.set_result, result)

    def _settle(self, set_outcome: Callable[[Any], None], outcome: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
            self._loop.call_soon_threadsafe(set_outcome, outcome)
