import asyncio
import threading

import pytest

from janus_proto.v1 import control_pb2
from janus_server.comm.load_report import LoadReport

DEADLINE_S = 60


def numbered(number: int) -> control_pb2.ExpertLoad:
    return control_pb2.ExpertLoad(num_layer_steps=number)


def test_the_load_is_taken_off_the_event_loop() -> None:
    def take() -> control_pb2.ExpertLoad:
        threads.append(threading.current_thread())
        return numbered(len(threads))

    async def check() -> None:
        report = LoadReport(take)
        assert [await report.within(DEADLINE_S) for _ in range(2)] == [numbered(1), numbered(2)]

    threads: list[threading.Thread] = []
    asyncio.run(check())
    assert threading.main_thread() not in threads


def test_a_failing_report_is_logged_once_and_may_recover(caplog: pytest.LogCaptureFixture) -> None:
    def take() -> control_pb2.ExpertLoad:
        if fails:
            raise RuntimeError("the device is gone")
        return numbered(1)

    async def check() -> None:
        report = LoadReport(take)
        assert [await report.within(DEADLINE_S) for _ in range(3)] == [None] * 3
        fails.clear()
        assert await report.within(DEADLINE_S) == numbered(1)

    fails = [True]
    asyncio.run(check())
    assert caplog.messages == ["heartbeats go on without the load: it failed"]
    assert "the device is gone" in caplog.text


def test_a_slow_report_is_left_to_the_next_heartbeat(caplog: pytest.LogCaptureFixture) -> None:
    def take() -> control_pb2.ExpertLoad:
        calls.append(None)
        told.wait(DEADLINE_S)
        return numbered(7)

    async def check() -> None:
        report = LoadReport(take)
        assert [await report.within(0.01) for _ in range(3)] == [None] * 3
        told.set()
        assert await report.within(DEADLINE_S) == numbered(7)

    told, calls = threading.Event(), []
    asyncio.run(check())
    assert len(calls) == 1
    assert caplog.messages == ["heartbeats go on without the load: it took longer than 0.01 s"]
