import asyncio
import threading

import pytest

from janus_server.comm import work_thread
from janus_server.comm.work_thread import WorkThread
from janus_server.errors import PeerLostError

DEADLINE_S = 60


def raise_lost() -> None:
    raise PeerLostError("mine")


def test_the_result_and_the_error_of_the_work() -> None:
    async def check() -> None:
        assert await WorkThread(lambda: 7, name="counting").result() == 7
        with pytest.raises(PeerLostError, match="mine"):
            await WorkThread(raise_lost, name="failing").result()

    asyncio.run(check())


def test_work_goes_on_when_nobody_waits_any_more_and_is_awaited_at_its_end() -> None:
    async def check() -> None:
        told = threading.Event()
        thread = WorkThread(lambda: told.wait(DEADLINE_S), name="serving")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(thread.result(), 0.01)
        told.set()
        await thread.end(grace_s=DEADLINE_S, abandon=lambda: pytest.fail("too early"))
        assert await thread.result()

    asyncio.run(check())


def test_a_failure_while_ending_is_raised() -> None:
    async def check() -> None:
        thread = WorkThread(raise_lost, name="failing")
        with pytest.raises(PeerLostError, match="mine"):
            await thread.end(grace_s=DEADLINE_S, abandon=lambda: pytest.fail("too early"))

    asyncio.run(check())


def test_work_that_does_not_end_is_abandoned() -> None:
    async def check() -> None:
        told = threading.Event()
        thread = WorkThread(lambda: told.wait(DEADLINE_S), name="serving")
        with pytest.raises(PeerLostError, match=r"serving did not end within 0\.01 s"):
            await thread.end(grace_s=0.01, abandon=told.set)

    asyncio.run(check())


def test_work_that_cannot_be_ended_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        told = threading.Event()
        thread = WorkThread(lambda: told.wait(DEADLINE_S), name="serving")
        with pytest.raises(PeerLostError, match="nor when its peers were given up"):
            await thread.end(grace_s=0.01, abandon=lambda: None)
        told.set()
        await thread.result()

    monkeypatch.setattr(work_thread, "_ABANDON_GRACE_S", 0.01)
    asyncio.run(check())


def test_work_does_not_keep_the_process_from_ending() -> None:
    async def check() -> None:
        WorkThread(lambda: told.wait(DEADLINE_S), name="loading")

    told = threading.Event()
    asyncio.run(check())
    told.set()
