import asyncio
import contextlib
from collections.abc import AsyncIterator

import psutil
import pytest

from janus_server.errors import PeerLostError
from janus_server.supervisor import Supervisor, describe_exit

DEADLINE_S = 60.0

SLEEP = "import time; time.sleep(600)"
STUBBORN = f"""
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("listening stubborn", flush=True)
{SLEEP}
"""


def statement(source: str) -> list[str]:
    """Arguments that make the module `timeit` run a statement once."""
    return ["-n1", "-r1", source]


@contextlib.asynccontextmanager
async def supervisor(hurry: asyncio.Event | None = None) -> AsyncIterator[Supervisor]:
    """A supervisor whose children are ended, and gone, afterwards."""
    parent = Supervisor(hurry=hurry or asyncio.Event())
    try:
        yield parent
    finally:
        await parent.end(parent.children, timeout_s=DEADLINE_S)
        assert not any(psutil.pid_exists(child.pid) for child in parent.children)


def test_a_child_announces_its_address_among_other_output() -> None:
    async def check() -> None:
        source = f"print('[Gloo] hello'); print('listening here:7', flush=True); {SLEEP}"
        async with supervisor() as parent:
            child = await parent.spawn("talker", "timeit", statement(source), announces=True)
            assert await asyncio.wait_for(child.address(), DEADLINE_S) == "here:7"

    asyncio.run(check())


def test_a_child_that_ends_unasked_is_named() -> None:
    async def check() -> None:
        async with supervisor() as parent:
            await parent.spawn("sleeper", "timeit", statement(SLEEP))
            child = await parent.spawn("quitter", "timeit", statement("import os; os._exit(3)"))
            with pytest.raises(PeerLostError) as caught:
                await parent.unless_failed(asyncio.sleep(600))
            assert str(caught.value) == f"the quitter (pid {child.pid}) ended with exit status 3"
            with pytest.raises(PeerLostError, match="quitter"):
                await parent.wait_for_failure()

    asyncio.run(check())


def test_an_error_on_the_way_to_an_end_that_was_asked_for_is_a_crash() -> None:
    async def check() -> None:
        source = (
            "import signal, os; signal.signal(signal.SIGTERM, lambda *_: os._exit(3)); "
            f"print('listening here', flush=True); {SLEEP}"
        )
        async with supervisor() as parent:
            child = await parent.spawn("loser", "timeit", statement(source), announces=True)
            await child.address()
            await parent.end([child], timeout_s=DEADLINE_S)
            assert parent.has_crashed
            assert parent.failure == f"the loser (pid {child.pid}) ended with exit status 3"

    asyncio.run(check())


def test_an_end_that_was_asked_for_is_no_failure() -> None:
    async def check() -> None:
        async with supervisor() as parent:
            child = await parent.spawn("sleeper", "timeit", statement(SLEEP))
            await parent.end([child], timeout_s=DEADLINE_S)
            assert await child.exited == -15
            assert not parent.has_failed
            assert not parent.has_crashed
            assert await parent.unless_failed(asyncio.sleep(0, "result")) == "result"

    asyncio.run(check())


def test_the_error_of_the_work_passes() -> None:
    async def fail() -> None:
        raise KeyError("mine")

    async def check() -> None:
        async with supervisor() as parent:
            with pytest.raises(KeyError, match="mine"):
                await parent.unless_failed(fail())

    asyncio.run(check())


def test_a_child_that_ignores_the_request_is_killed() -> None:
    async def check() -> None:
        async with supervisor() as parent:
            child = await parent.spawn("mule", "timeit", statement(STUBBORN), announces=True)
            await child.address()
            await parent.end([child], timeout_s=0.1)
            assert await child.exited == -9
            assert child.has_hung

    asyncio.run(check())


def test_hurry_cuts_the_wait_short() -> None:
    async def check() -> None:
        hurry = asyncio.Event()
        async with supervisor(hurry) as parent:
            child = await parent.spawn("mule", "timeit", statement(STUBBORN), announces=True)
            await child.address()
            ending = asyncio.create_task(parent.end([child], timeout_s=600))
            await asyncio.sleep(0)
            hurry.set()
            await asyncio.wait_for(ending, DEADLINE_S)
            assert await child.exited == -9
            assert not child.has_hung

    asyncio.run(check())


def test_a_cancelled_end_leaves_no_child_running() -> None:
    async def check() -> None:
        async with supervisor() as parent:
            child = await parent.spawn("mule", "timeit", statement(STUBBORN), announces=True)
            await child.address()
            ending = asyncio.create_task(parent.end([child], timeout_s=600))
            await asyncio.sleep(0.05)
            ending.cancel()
            assert await asyncio.wait_for(child.exited, DEADLINE_S) == -9

    asyncio.run(check())


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "ended with exit status 0"),
        (-9, "was killed by SIGKILL"),
        (-1000, "was killed by signal 1000"),
    ],
)
def test_exits_in_words(status: int, words: str) -> None:
    assert describe_exit(status) == words
