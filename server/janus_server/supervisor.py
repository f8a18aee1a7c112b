"""Child processes: start them, notice the first that ends unasked, and leave none behind.

Every child has a lifeline: its standard input is a pipe that closes when this process ends, however
it ends, and tells it when to end. Each runs in a session of its own, so that Ctrl-C reaches only
the parent; once it runs, it leaves the signals that reach it to the parent.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from janus_server.errors import PeerLostError
from janus_server.lifeline import END, END_COMES
from janus_server.process import STOP_SIGNALS, announced_address

logger = logging.getLogger(__name__)

T = TypeVar("T")

_FROZEN_TIMEOUT_S = 3.0
"""How long a child that is stopped may take to be continued and to end, in seconds."""

_ALL_SIGNALLED_S = 0.5
"""How far apart the processes may get a signal that is sent to all of them, in seconds."""


class Child:
    """One child process."""

    def __init__(self, name: str, process: Process) -> None:
        self.name = f"{name} (pid {process.pid})"
        """For messages: what it is, and its process id."""
        self.pid = process.pid
        self.is_ending = False
        """Whether it was asked to end."""
        self.is_late = False
        """Whether it was killed because it did not end in time."""
        self.was_frozen = False
        """Whether it was killed because it was stopped, by a signal or a debugger."""
        self.process = process
        self.exited = asyncio.create_task(process.wait(), name=f"exit of {self.name}")
        """Its exit status; negative: the signal that killed it."""
        self._was_killed = False
        self._address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._output = asyncio.create_task(self._read_output(), name=f"output of {self.name}")

    @property
    def was_shot(self) -> bool:
        """Whether a signal ended it that this process did not send; it must have exited."""
        status = self.exited.result()
        return (
            status < 0 and not self._was_killed and not (self.is_ending and -status in STOP_SIGNALS)
        )

    async def address(self) -> str:
        """Wait for the HOST:PORT that the child announces; it must have been started for that."""
        return await asyncio.shield(self._address)

    def announce_end(self) -> None:
        """Let it know that it will be asked to end, so that it takes signals for part of that."""
        self._say(END_COMES)

    def end(self) -> None:
        """Ask it to end, once."""
        if not self.is_ending:
            self.is_ending = True
            self._say(END)
            # Ends a child that is still importing; later it heeds the lifeline alone.
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()

    def kill(self) -> None:
        """Kill it and whatever it has started."""
        self._was_killed = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    async def close(self) -> None:
        """Let go of an exited child's pipes."""
        await self._output

    def _say(self, word: bytes) -> None:
        assert self.process.stdin is not None
        if not self.exited.done():
            self.process.stdin.write(word)

    async def _read_output(self) -> None:
        if self.process.stdout is None:
            return
        # Reads on after the announcement, or the pipe would fill and block the child.
        while line := await self.process.stdout.readline():
            address = announced_address(line.decode(errors="replace"))
            if address is not None and not self._address.done():
                self._address.set_result(address)


class Supervisor:
    """The children of this process. `end` them all before the event loop closes.

    `stderr` takes what the children log; None: this process's own standard error. Setting `hurry`
    turns every wait for an orderly end into a kill.
    """

    def __init__(self, *, hurry: asyncio.Event, stderr: IO[bytes] | None = None) -> None:
        self.children: list[Child] = []
        self._hurry = hurry
        self._stderr = stderr
        self._failed = asyncio.Event()
        self._failures: list[Child] = []
        """In the order in which they ended."""
        self._watches: list[asyncio.Task[None]] = []

    @property
    def has_failed(self) -> bool:
        """Whether a child ended unasked, or with an error."""
        return self._failed.is_set()

    @property
    def has_crashed(self) -> bool:
        """Whether the exit status of such a child was none of an orderly end."""
        return any(child.exited.result() != 0 for child in self._failures)

    @property
    def failure(self) -> str:
        """Who ended first unasked, or with an error, and how.

        A child that a signal ended goes first: peers may notice its end before the system is done.
        """
        first = min(self._failures, key=lambda child: not child.was_shot)
        return f"the {first.name} {describe_exit(first.exited.result())}"

    async def spawn(
        self,
        name: str,
        module: str,
        argv: Sequence[str],
        *,
        announces: bool = False,
        pass_fds: Sequence[int] = (),
    ) -> Child:
        """Start `python -m module argv`; `announces`: it tells the address on which it listens.

        It inherits `pass_fds` under the same numbers.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # a module in the working directory must not shadow ours
            "-m",
            "janus_server.child",
            module,
            *argv,
            stdin=PIPE,
            stdout=PIPE if announces else DEVNULL,
            stderr=self._stderr,
            start_new_session=True,
            pass_fds=tuple(pass_fds),
        )
        child = Child(name, process)
        self.children.append(child)
        self._watches.append(asyncio.create_task(self._watch(child), name=f"watch {child.name}"))
        return child

    async def unless_failed(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work`, or cancel it and raise PeerLostError when a child ends unasked."""
        working = asyncio.create_task(work)
        failing = asyncio.create_task(self._failed.wait())
        try:
            await asyncio.wait({working, failing}, return_when=asyncio.FIRST_COMPLETED)
            if self._failed.is_set():
                raise PeerLostError(self.failure)
            return working.result()
        finally:
            working.cancel()
            failing.cancel()
            await asyncio.wait({working, failing})

    async def wait_for_failure(self) -> None:
        """Wait until a child ends unasked, and raise PeerLostError that names it."""
        await self._failed.wait()
        raise PeerLostError(self.failure)

    async def end(self, children: Sequence[Child], *, timeout_s: float) -> None:
        """End these children together; kill those that take longer than `timeout_s` seconds.

        Those that are stopped are killed soon: they cannot end, and others may wait for them.
        """
        for child in children:
            child.end()
        try:
            await self._wait_for_exits(children, min(timeout_s, _FROZEN_TIMEOUT_S))
            self._kill([child for child in _running(children) if is_stopped(child.pid)])
            await self._wait_for_exits(children, timeout_s)
        finally:
            self._kill(_running(children))
        for child in children:
            await child.exited
            await child.close()

    def _kill(self, children: Sequence[Child]) -> None:
        for child in children:
            if not self._hurry.is_set():
                child.was_frozen = is_stopped(child.pid)
                child.is_late = not child.was_frozen
                reason = "is stopped" if child.was_frozen else "did not end in time"
                logger.warning("killing the %s, which %s", child.name, reason)
            child.kill()

    async def _wait_for_exits(self, children: Sequence[Child], timeout_s: float) -> None:
        """Wait until all have exited or the time is up; not at all in a hurry."""
        exits = {child.exited for child in _running(children)}
        if not exits:
            return
        all_exited = asyncio.create_task(asyncio.wait(exits))
        hurrying = asyncio.create_task(self._hurry.wait())
        try:
            await asyncio.wait(
                {all_exited, hurrying}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            all_exited.cancel()
            hurrying.cancel()

    def announce_end(self) -> None:
        """Tell all children that `end` will follow; they stay silent about signals from then on."""
        for child in self.children:
            child.announce_end()

    def kill_all(self) -> None:
        """Kill every child that still runs, without waiting."""
        for child in _running(self.children):
            child.kill()

    async def _watch(self, child: Child) -> None:
        status = await child.exited
        if not child.is_ending and -status in STOP_SIGNALS:
            # It was importing. Whoever signals all processes at once signals this one as well.
            await asyncio.sleep(_ALL_SIGNALLED_S)
        if not child.is_ending or status > 0 or child.was_shot:
            self._failures.append(child)
            self._failed.set()


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped, by SIGSTOP or a debugger; False where that cannot be known."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return False
    # The name before the state is in parentheses and may hold anything.
    return stat.rpartition(")")[2].split()[0] in ("T", "t")


def _running(children: Sequence[Child]) -> list[Child]:
    return [child for child in children if not child.exited.done()]


def describe_exit(status: int) -> str:
    """Say how a process ended, from its exit status; negative: the signal that killed it."""
    if status >= 0:
        return f"ended with exit status {status}"
    if status == -signal.SIGKILL:
        return "was killed by SIGKILL, as the kernel does where memory runs out"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
