"""Run a worker's part in an epoch until it is told to stop or loses its controller."""

import asyncio
from collections.abc import Coroutine

from janus_server.comm.control_client import ControlClient
from janus_server.errors import PeerLostError


async def run_until_stopped(
    work: Coroutine[None, None, None],
    *,
    stop: asyncio.Event,
    control: ControlClient,
    has_parent: bool,
) -> None:
    """Run `work` until it ends or `stop` is set, when it is cancelled and may clean up.

    A worker without a parent, which would end the others as well, tells them that it leaves.
    Raises what `work` raises, and PeerLostError when the controller stays silent or ends the epoch.
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
        if stop.is_set() and not has_parent:
            await control.leave()
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.wait(tasks.values())
    if not tasks["work"].cancelled():
        tasks["work"].result()
    if control.lost.is_set():
        raise PeerLostError(control.loss)


async def _wait(event: asyncio.Event) -> None:
    await event.wait()
