import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator

import psutil
import pytest

from janus_server.errors import PeerLostError
from janus_server.lifeline import END, END_COMES
from janus_server.supervisor import Supervisor, describe_exit, is_stopped

DEADLINE_S = 60.0

SLEEP = "import time; time.sleep(600)"
STUBBORN = f"""
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("listening stubborn", flush=True)
{SLEEP}
"""
HEEDS_WORDS = f"""
import os, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("listening here", flush=True)
assert os.read(0, 1) == {END_COMES!r}
assert os.read(0, 1) == {END!r}
os._exit(0)
"""
WAITER = """
import os, signal, time
def wait(number, frame):
    while os.path.exists('/proc/{pid}'):
        time.sleep(0.01)
    os._exit(0)
signal.signal(signal.SIGTERM, wait)
print("listening waiter", flush=True)
time.sleep(600)
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


def test_a_child_ends_at_a_word_alone() -> None:
    async def check() -> None:
        async with supervisor() as parent:
            child = await parent.spawn("heeder", "timeit", statement(HEEDS_WORDS), announces=True)
            await child.address()
            parent.announce_end()
            await parent.end([child], timeout_s=DEADLINE_S)
            assert await child.exited == 0

    asyncio.run(check())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_all_is_no_failure_of_a_child_that_gets_it_first(
    number: signal.Signals,
) -> None:
    async def check() -> None:
        async with supervisor() as parent:
            source = (
                f"import signal; signal.signal({number}, signal.SIG_DFL); "
                f"print('listening here', flush=True); {SLEEP}"
            )
            child = await parent.spawn("sleeper", "timeit", statement(source), announces=True)
            await child.address()
            os.kill(child.pid, number)
            assert await child.exited == -number
            await parent.end(parent.children, timeout_s=DEADLINE_S)
            failing = asyncio.create_task(parent.wait_for_failure())
            assert (await asyncio.wait([failing], timeout=1))[0] == set()
            failing.cancel()

    asyncio.run(check())


def test_a_signal_to_a_child_alone_is_its_failure() -> None:
    async def check() -> None:
        async with supervisor() as parent:
            child = await parent.spawn("sleeper", "timeit", statement(SLEEP))
            os.kill(child.pid, signal.SIGTERM)
            with pytest.raises(PeerLostError) as caught:
                await parent.wait_for_failure()
            assert str(caught.value) == f"the sleeper (pid {child.pid}) was killed by SIGTERM"

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
            assert child.is_late
            assert not child.was_frozen

    asyncio.run(check())


def test_who_waits_for_a_child_that_is_stopped_is_not_killed() -> None:
    """The second child ends when the first has; the first cannot."""

    async def check() -> None:
        async with supervisor() as parent:
            frozen = await parent.spawn("frozen", "timeit", statement(STUBBORN), announces=True)
            waiter = await parent.spawn(
                "waiter", "timeit", statement(WAITER.format(pid=frozen.pid)), announces=True
            )
            await asyncio.gather(frozen.address(), waiter.address())
            os.kill(frozen.pid, signal.SIGSTOP)
            await parent.end([frozen, waiter], timeout_s=1)
            assert (await frozen.exited, await waiter.exited) == (-9, 0)
            assert (frozen.was_frozen, waiter.was_frozen) == (True, False)
            assert (frozen.is_late, waiter.is_late) == (False, False)
            assert not parent.has_failed

    asyncio.run(check())


def test_a_child_that_somebody_kills_is_named_even_if_a_peer_ended_sooner() -> None:
    async def check() -> None:
        async with supervisor() as parent:
            victim = await parent.spawn("victim", "timeit", statement(STUBBORN), announces=True)
            await victim.address()
            await parent.spawn("peer", "timeit", statement("import os; os._exit(1)"))
            with pytest.raises(PeerLostError, match="the peer"):
                await parent.wait_for_failure()
            ending = asyncio.create_task(parent.end(parent.children, timeout_s=DEADLINE_S))
            await asyncio.sleep(0)
            os.kill(victim.pid, signal.SIGKILL)
            await ending
            assert parent.failure.startswith(f"the victim (pid {victim.pid}) was killed by SIGKILL")

    asyncio.run(check())


def test_a_process_that_runs_is_not_stopped() -> None:
    assert not is_stopped(os.getpid())
    assert not is_stopped(2**22 + 1)  # beyond the largest process id


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
            assert not child.is_late

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
        (-9, "was killed by SIGKILL, as the kernel does where memory runs out"),
        (-11, "was killed by SIGSEGV"),
        (-1000, "was killed by signal 1000"),
    ],
)
def test_exits_in_words(status: int, words: str) -> None:
    assert describe_exit(status) == words
