import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator

import grpc
import pytest

from janus_proto.v1 import control_pb2
from janus_proto.v1.control_pb2_grpc import (
    ControlServiceServicer,
    add_ControlServiceServicer_to_server,
)
from janus_server.comm import control_client
from janus_server.comm.control_client import ControlClient
from janus_server.errors import ConfigError, UnavailableError
from janus_server.grpc_server import RunningServer, start_server

NOWHERE = "127.0.0.1:1"
"""A port on which nothing listens."""


class FakeControlService(ControlServiceServicer):
    """Notes heartbeats; on each connection it streams one message and then ends the stream."""

    def __init__(self, heartbeat_interval_s: float) -> None:
        self.heartbeat_interval_s = heartbeat_interval_s
        self.failures: list[grpc.StatusCode] = []
        """What the next registrations and heartbeats are answered with, the last first."""
        self.num_registrations = 0
        self.ready_epochs: list[int] = []
        self.loads: list[control_pb2.ExpertLoad | None] = []
        self.heard = asyncio.Event()
        self.num_watches = 0
        self.watch_failure: grpc.StatusCode | None = None
        self.is_mute = False
        """Whether streams of epochs end before their first message."""

    async def Register(self, request, context):
        self.num_registrations += 1
        if self.failures:
            await context.abort(self.failures.pop(), "scripted to fail")
        return control_pb2.RegisterResponse(
            worker_id="w", incarnation="i", heartbeat_interval_s=self.heartbeat_interval_s
        )

    async def Heartbeat(self, request, context):
        assert (request.worker_id, request.incarnation) == ("w", "i")
        if self.failures:
            await context.abort(self.failures.pop(), "scripted to fail")
        self.ready_epochs.append(request.ready_epoch)
        self.loads.append(request.expert_load if request.HasField("expert_load") else None)
        self.heard.set()
        return control_pb2.HeartbeatResponse()

    async def WatchEpochs(self, request, context):
        self.num_watches += 1
        if not self.is_mute:
            yield control_pb2.WatchEpochsResponse(epoch=control_pb2.Epoch(number=self.num_watches))
        if self.watch_failure is not None:
            await context.abort(self.watch_failure, "scripted to break")

    async def GetExpertLoads(self, request, context):
        raise AssertionError("not called")


async def start(service: FakeControlService, listen: str = "127.0.0.1:0") -> RunningServer:
    return await start_server(
        lambda server: add_ControlServiceServicer_to_server(service, server), [], listen
    )


@contextlib.asynccontextmanager
async def client(address: str) -> AsyncIterator[ControlClient]:
    control = ControlClient(address)
    try:
        yield control
    finally:
        await control.close()


async def register(control: ControlClient, timeout_s: float = 30.0) -> str:
    return await control.register(
        control_pb2.RegisterRequest(role=control_pb2.WORKER_ROLE_EXPERT), timeout_s=timeout_s
    )


def test_readiness_is_reported_at_once() -> None:
    async def check() -> None:
        service = FakeControlService(heartbeat_interval_s=1000.0)
        server = await start(service)
        async with client(server.address) as control:
            await register(control)
            await asyncio.wait_for(service.heard.wait(), 30)
            service.heard.clear()
            control.set_ready(3)
            await asyncio.wait_for(service.heard.wait(), 30)
        await server.stop(0)
        assert service.ready_epochs == [0, 3]

    asyncio.run(check())


@pytest.mark.parametrize("is_hanging", [False, True])
def test_heartbeats_go_on_without_a_load_that_cannot_be_had(is_hanging: bool) -> None:
    def take() -> control_pb2.ExpertLoad:
        if is_hanging:
            told.wait(60)
        raise RuntimeError("the device is gone")

    async def check() -> None:
        service = FakeControlService(heartbeat_interval_s=1000.0)
        server = await start(service)
        async with client(server.address) as control:
            control.report_load(take)
            await register(control)
            for epoch in range(3):
                control.set_ready(epoch)
                await asyncio.wait_for(service.heard.wait(), 30)
                service.heard.clear()
        await server.stop(0)
        assert set(service.loads) == {None}

    told = threading.Event()
    asyncio.run(check())
    told.set()


def test_a_fault_in_the_heartbeats_ends_the_worker_by_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def check() -> None:
        server = await start(FakeControlService(heartbeat_interval_s=1000.0))
        async with client(server.address) as control:
            await register(control)
            control.set_ready(2**64)  # no message holds that
            await asyncio.wait_for(control.lost.wait(), 30)
        await server.stop(0)

    asyncio.run(check())
    assert "the heartbeats failed" in caplog.messages


@pytest.mark.parametrize("is_registered", [True, False])
def test_leaving_a_controller_that_is_gone_is_no_error(is_registered: bool) -> None:
    async def check() -> None:
        server = await start(FakeControlService(heartbeat_interval_s=1000.0))
        async with client(server.address) as control:
            if is_registered:
                await register(control)
            await server.stop(0)
            await control.leave()
            assert not control.lost.is_set()

    asyncio.run(check())


def test_a_controller_that_falls_silent_is_lost() -> None:
    async def check() -> None:
        service = FakeControlService(heartbeat_interval_s=0.2)
        server = await start(service)
        async with client(server.address) as control:
            await register(control)
            await asyncio.wait_for(service.heard.wait(), 30)
            assert not control.lost.is_set()
            await server.stop(0)
            await asyncio.wait_for(control.lost.wait(), 30)
            assert f"the controller at {server.address} has not answered for" in control.loss

    asyncio.run(check())


@pytest.mark.parametrize(("num_failures", "is_lost"), [(2, False), (3, True)])
def test_a_few_heartbeats_may_fail_however_long_they_take(
    num_failures: int, is_lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        service = FakeControlService(heartbeat_interval_s=0.2)
        server = await start(service)
        async with client(server.address) as control:
            await register(control)
            service.failures = [grpc.StatusCode.UNAVAILABLE] * num_failures
            heard = asyncio.create_task(service.heard.wait())
            lost = asyncio.create_task(control.lost.wait())
            await asyncio.wait({heard, lost}, timeout=30, return_when=asyncio.FIRST_COMPLETED)
            assert (heard.done(), lost.done()) == (not is_lost, is_lost)
            heard.cancel()
            lost.cancel()
        await server.stop(0)

    # As if this process had been held up for longer than any silence that is borne.
    monkeypatch.setattr(control_client, "LOST_AFTER_INTERVALS", 0)
    asyncio.run(check())


@pytest.mark.parametrize("code", [grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAUTHENTICATED])
def test_a_controller_that_does_not_know_this_worker_is_lost_at_once(
    code: grpc.StatusCode,
) -> None:
    async def check() -> None:
        service = FakeControlService(heartbeat_interval_s=1000.0)
        server = await start(service)
        async with client(server.address) as control:
            await register(control)
            service.failures = [code]
            await asyncio.wait_for(control.lost.wait(), 30)
            assert control.loss == (
                f"the controller at {server.address} is not the one that this worker registered "
                "with: scripted to fail"
            )
        await server.stop(0)

    asyncio.run(check())


@pytest.mark.parametrize("interval_s", [0.0, -1.0, float("nan"), float("inf"), 1e6])
def test_an_interval_that_makes_no_sense_is_refused(interval_s: float) -> None:
    async def check() -> None:
        server = await start(FakeControlService(interval_s))
        async with client(server.address) as control:
            with pytest.raises(UnavailableError, match=f"asks for a heartbeat every {interval_s}"):
                await register(control)
        await server.stop(0)

    asyncio.run(check())


def test_registration_waits_for_a_controller_that_starts_later() -> None:
    async def check() -> None:
        service = FakeControlService(heartbeat_interval_s=1000.0)
        server = await start(service)
        await server.stop(0)
        async with client(server.address) as control:
            registering = asyncio.create_task(register(control))
            await asyncio.sleep(0.05)
            server = await start(service, server.address)
            assert await registering == "w"
        await server.stop(0)

    asyncio.run(check())


@pytest.mark.parametrize(
    "failure",
    [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL],
)
def test_a_registration_that_broke_is_sent_again(failure: grpc.StatusCode) -> None:
    async def check() -> None:
        service = FakeControlService(heartbeat_interval_s=1000.0)
        service.failures = [failure] * 2
        server = await start(service)
        async with client(server.address) as control:
            assert await register(control) == "w"
        await server.stop(0)
        assert service.num_registrations == 3

    asyncio.run(check())


@pytest.mark.parametrize(
    "refusal",
    [
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.UNIMPLEMENTED,
    ],
)
def test_a_registration_that_is_refused_is_not(refusal: grpc.StatusCode) -> None:
    async def check() -> None:
        service = FakeControlService(heartbeat_interval_s=1000.0)
        service.failures = [refusal]
        server = await start(service)
        async with client(server.address) as control:
            with pytest.raises(ConfigError, match="the controller refused: scripted to fail"):
                await register(control)
        await server.stop(0)
        assert service.num_registrations == 1

    asyncio.run(check())


def test_registration_without_controller_names_its_address() -> None:
    async def check() -> None:
        async with client(NOWHERE) as control:
            with pytest.raises(UnavailableError, match=NOWHERE):
                await register(control, timeout_s=0.2)

    asyncio.run(check())


@pytest.mark.parametrize(
    "failure",
    [
        None,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    ],
)
def test_watching_goes_on_after_the_stream_broke(failure: grpc.StatusCode | None) -> None:
    async def check() -> None:
        service = FakeControlService(heartbeat_interval_s=1.0)
        service.watch_failure = failure
        server = await start(service)
        numbers = []
        async with (
            client(server.address) as control,
            contextlib.aclosing(control.epochs()) as epochs,
        ):
            async for response in epochs:
                numbers.append(response.epoch.number)
                if len(numbers) == 3:
                    break
        await server.stop(0)
        assert numbers == [1, 2, 3]

    asyncio.run(check())


def test_watching_gives_up_on_streams_that_bring_nothing() -> None:
    async def check() -> None:
        service = FakeControlService(heartbeat_interval_s=1.0)
        service.watch_failure, service.is_mute = grpc.StatusCode.INTERNAL, True
        server = await start(service)
        async with client(server.address) as control:
            with pytest.raises(UnavailableError, match=r"failed: scripted|did not answer within"):
                await anext(control.epochs(timeout_s=0.5))
        await server.stop(0)
        assert 2 <= service.num_watches <= 10

    asyncio.run(check())


def test_watching_gives_up_on_a_controller_that_is_gone() -> None:
    async def check() -> None:
        async with client(NOWHERE) as control:
            with pytest.raises(UnavailableError, match=f"{NOWHERE} did not answer within"):
                await anext(control.epochs(timeout_s=0.2))

    asyncio.run(check())
