"""Run a worker's part in an epoch until it is told to stop or loses its controller."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from janus_server.comm.control_client import ControlClient
from janus_server.errors import PeerLostError

T = TypeVar("T")


async def run_until_stopped(
    work: Coroutine[None, None, None], *, stop: asyncio.Event, control: ControlClient
) -> None:
    """Run `work` until it ends or `stop` is set, when it is cancelled and may clean up.

    Raises what `work` raises, and PeerLostError when the controller stays silent.
    """
    tasks = {
        name: asyncio.create_task(coroutine, name=name)
        for name, coroutine in {
            "work": work,
            "stop": _wait(stop),
            "lost controller": _wait(control.lost),
        }.items()
    }
    try:
        await asyncio.wait(tasks.values(), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.wait(tasks.values())
    if not tasks["work"].cancelled():
        tasks["work"].result()
    if control.lost.is_set():
        raise PeerLostError(f"the controller at {control.address} does not answer any more")


async def in_daemon_thread(work: Callable[[], T]) -> T:
    """Run blocking `work`, such as loading or meeting peers, off the event loop.

    Unlike the loop's own threads, this one keeps no process from ending when it is told to stop.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(set_outcome: Callable[[Any], None], outcome: Any) -> None:
        if not done.done():  # cancelled, as the worker was told to stop
            set_outcome(outcome)

    def run() -> None:
        try:
            outcome: tuple[Callable[[Any], None], Any] = (done.set_result, work())
        except Exception as error:
            outcome = (done.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=run, name="blocking work", daemon=True).start()
    return await done


async def _wait(event: asyncio.Event) -> None:
    await event.wait()
