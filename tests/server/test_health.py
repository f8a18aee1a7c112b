import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from janus_server.grpc_server import RunningServer, start_server
from tests.fakes.endpoint import CALL_S, within_deadline
from tests.fakes.http2 import raw_connection

SERVICE = "janus.v1.Something"
Status = health_pb2.HealthCheckResponse


@contextlib.asynccontextmanager
async def running() -> AsyncIterator[tuple[RunningServer, Any]]:
    server = await start_server(lambda server: None, [SERVICE], "127.0.0.1:0")
    async with grpc.aio.insecure_channel(server.address) as channel:
        try:
            yield server, health_pb2_grpc.HealthStub(channel)
        finally:
            await server.stop(0)


def request(service: str = SERVICE) -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=service)


def test_every_watcher_sees_every_change() -> None:
    async def check() -> None:
        async with running() as (server, stub):
            watches = [stub.Watch(request(name)) for name in (SERVICE, SERVICE, "")]
            for watch in watches:
                assert (await watch.read()).status == Status.NOT_SERVING
            # The end of one watch means nothing to the others.
            watches.pop(0).cancel()
            for serving, status in ((True, Status.SERVING), (False, Status.NOT_SERVING)):
                server.set_serving(serving)
                for watch in watches:
                    assert (await watch.read()).status == status

    within_deadline(check())


def test_a_service_that_is_not_here() -> None:
    async def check() -> None:
        async with running() as (_, stub):
            assert (await stub.Watch(request("x")).read()).status == Status.SERVICE_UNKNOWN
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stub.Check(request("x"), timeout=CALL_S)
            assert raised.value.code() is grpc.StatusCode.NOT_FOUND

    within_deadline(check())


def test_a_watcher_that_does_not_read_holds_up_nobody() -> None:
    async def check() -> None:
        async with running() as (server, stub):
            other = stub.Watch(request())
            await other.read()
            async with raw_connection(server.address, window=0) as stalled:
                await stalled.call(
                    1, b"/grpc.health.v1.Health/Watch", request().SerializeToString()
                )
                await anext(frame async for frame in stalled.frames() if frame.stream == 1)
                server.set_serving(True)
                await asyncio.sleep(0)
                server.set_serving(False)
                while (await other.read()).status != Status.NOT_SERVING:
                    pass
                assert (await stub.Check(request())).status == Status.NOT_SERVING
                await server.stop(0)

    within_deadline(check())
