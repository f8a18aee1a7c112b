"""Child processes: start them, notice the first that ends unasked, and leave none behind.

Every child has a lifeline: its standard input is a pipe that closes when this process ends, however
it ends. Each runs in a session of its own, so that Ctrl-C reaches only the parent, which then ends
its children in the right order.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Coroutine, Sequence
from typing import IO, Any, TypeVar

from janus_server.errors import PeerLostError
from janus_server.process import announced_address

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Child:
    """One child process."""

    def __init__(self, name: str, process: Process) -> None:
        self.name = f"{name} (pid {process.pid})"
        """For messages: what it is, and its process id."""
        self.pid = process.pid
        self.is_ending = False
        """Whether it was asked to end."""
        self.has_hung = False
        """Whether it had to be killed because it did not end in time."""
        self.process = process
        self.exited = asyncio.create_task(process.wait(), name=f"exit of {self.name}")
        """Its exit status; negative: the signal that killed it."""
        self._address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._output = asyncio.create_task(self._read_output(), name=f"output of {self.name}")

    async def address(self) -> str:
        """Wait for the HOST:PORT that the child announces; it must have been started for that."""
        return await asyncio.shield(self._address)

    def end(self) -> None:
        """Ask it to end, once."""
        if not self.is_ending:
            self.is_ending = True
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()

    def kill(self) -> None:
        """Kill it and whatever it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    async def close(self) -> None:
        """Let go of an exited child's pipes."""
        await self._output

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
        self.failure = ""
        """Who ended first unasked, or with an error, and how."""
        self.has_crashed = False
        """Whether its exit status was none of an orderly end."""
        self._watches: list[asyncio.Task[None]] = []

    @property
    def has_failed(self) -> bool:
        """Whether a child ended unasked, or with an error."""
        return self._failed.is_set()

    async def spawn(
        self, name: str, module: str, argv: Sequence[str], *, announces: bool = False
    ) -> Child:
        """Start `python -m module argv`; `announces`: it tells the address on which it listens."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # a module in the working directory must not shadow ours
            "-m",
            module,
            *argv,
            stdin=PIPE,
            stdout=PIPE if announces else DEVNULL,
            stderr=self._stderr,
            start_new_session=True,
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
        """End these children together; kill those that take longer than `timeout_s` seconds."""
        for child in children:
            child.end()
        exits = {child.exited for child in children if not child.exited.done()}
        if exits:
            all_exited = asyncio.create_task(asyncio.wait(exits))
            hurrying = asyncio.create_task(self._hurry.wait())
            try:
                await asyncio.wait(
                    {all_exited, hurrying}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
                )
            finally:
                all_exited.cancel()
                hurrying.cancel()
                for child in children:
                    if not child.exited.done():
                        child.has_hung = not self._hurry.is_set()
                        logger.warning("killing the %s, which did not end in time", child.name)
                        child.kill()
            await asyncio.wait(exits)
        for child in children:
            await child.close()

    def kill_all(self) -> None:
        """Kill every child that still runs, without waiting."""
        for child in self.children:
            if not child.exited.done():
                child.kill()

    async def _watch(self, child: Child) -> None:
        status = await child.exited
        if (not child.is_ending or status > 0) and not self._failed.is_set():
            self.failure = f"the {child.name} {describe_exit(status)}"
            self.has_crashed = status != 0
            self._failed.set()


def describe_exit(status: int) -> str:
    """Say how a process ended, from its exit status; negative: the signal that killed it."""
    if status >= 0:
        return f"ended with exit status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
