"""The lifeline: the pipe from a parent to a child's standard input, by which the child lives.

Each byte that the parent writes is a word. The pipe closes when the parent ends, however it ends.
A process with a lifeline leaves SIGTERM, SIGINT and SIGHUP to its parent: systemd, for one, sends
them to all processes of a service at once, and the parent alone knows in which order they can end.

Invariant: such a process never outlives its parent by more than `LIFELINE_GRACE_S`.
"""

import asyncio
import logging
import os
import signal
import threading
import time

logger = logging.getLogger(__name__)

LIFELINE_GRACE_S = 20.0
"""How long an orderly stop may take once the parent is gone, in seconds."""

END_COMES = b"c"
"""The word for: the parent is ending, and will tell this process when to end."""
END = b"e"
"""The word for: end now, in order."""

_PARENT_SPEAKS_S = 1.0
"""How long after a signal the parent has spoken if the signal was sent to it, too, in seconds."""


class Lifeline:
    """A child's side: sets `stop` when the parent says so or is gone."""

    def __init__(self, stop: asyncio.Event) -> None:
        self._stop = stop
        self._loop = asyncio.get_running_loop()
        self._has_spoken = False
        """Whether the parent has said anything: all its words mean that the end comes."""
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def leave_to_parent(self, number: signal.Signals) -> None:
        """Do nothing about a signal but say so, where this process alone got it."""
        self._loop.call_later(_PARENT_SPEAKS_S, self._say_what_to_signal, number)

    def _say_what_to_signal(self, number: signal.Signals) -> None:
        if not self._has_spoken:
            logger.warning(
                "%s does not end this process (pid %d): signal its parent (pid %d), which ends it",
                *(number.name, os.getpid(), os.getppid()),
            )

    def _watch(self) -> None:
        # Not sys.stdin: a buffered reader held by a daemon thread aborts the interpreter's exit.
        try:
            while words := os.read(0, 4096):
                self._has_spoken = True
                if END in words:
                    self._end()
        except OSError:
            logger.warning("standard input cannot be read; taking it for closed")
        self._has_spoken = True
        self._end()
        time.sleep(LIFELINE_GRACE_S)
        logger.error("still running %.0f s after the parent ended; exiting hard", LIFELINE_GRACE_S)
        os._exit(1)

    def _end(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._stop.set)
        except RuntimeError:  # the loop is closed: the process is ending already
            logger.debug("the lifeline closed after the event loop")
