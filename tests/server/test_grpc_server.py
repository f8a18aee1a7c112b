import asyncio

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from janus_proto.v1 import control_pb2, control_pb2_grpc
from janus_server.errors import ConfigError
from janus_server.grpc_server import (
    RunningServer,
    ServerLimits,
    channel_options,
    start_server,
)
from tests.fakes.http2 import GOAWAY, raw_connection

SERVICE = "janus.v1.ControlService"


class FakeControlService(control_pb2_grpc.ControlServiceServicer):
    async def Register(self, request, context):
        return control_pb2.RegisterResponse(worker_id=request.address)

    async def Heartbeat(self, request, context):
        raise AssertionError("not called")

    def WatchEpochs(self, request, context):
        raise AssertionError("not called")

    async def GetExpertLoads(self, request, context):
        raise AssertionError("not called")


async def start(listen: str = "127.0.0.1:0", limits: ServerLimits | None = None) -> RunningServer:
    return await start_server(
        lambda server: control_pb2_grpc.add_ControlServiceServicer_to_server(
            FakeControlService(), server
        ),
        [SERVICE],
        listen,
        limits,
    )


def test_health_follows_set_serving_and_stop() -> None:
    async def check() -> None:
        server = await start()
        async with grpc.aio.insecure_channel(server.address, options=channel_options()) as channel:
            stub = health_pb2_grpc.HealthStub(channel)

            async def statuses() -> set[int]:
                requests = [health_pb2.HealthCheckRequest(service=s) for s in ("", SERVICE)]
                return {(await stub.Check(request, timeout=10)).status for request in requests}

            assert await statuses() == {health_pb2.HealthCheckResponse.NOT_SERVING}
            server.set_serving(True)
            assert await statuses() == {health_pb2.HealthCheckResponse.SERVING}
            server.set_serving(False)
            assert await statuses() == {health_pb2.HealthCheckResponse.NOT_SERVING}
            await server.stop(0)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await statuses()
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE

    asyncio.run(check())


def test_reflection_lists_the_services() -> None:
    async def check() -> None:
        server = await start()
        async with grpc.aio.insecure_channel(server.address, options=channel_options()) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            call = stub.ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            )
            response = await call.read()
        await server.stop(0)
        names = {service.name for service in response.list_services_response.service}
        assert {SERVICE, "grpc.health.v1.Health"} <= names

    asyncio.run(check())


def test_messages_above_the_default_limit_pass() -> None:
    async def check() -> None:
        server = await start()
        async with grpc.aio.insecure_channel(server.address, options=channel_options()) as channel:
            stub = control_pb2_grpc.ControlServiceStub(channel)
            address = "x" * (8 * 2**20)
            response = await stub.Register(control_pb2.RegisterRequest(address=address))
            assert response.worker_id == address
        await server.stop(0)

    asyncio.run(check())


def test_a_port_in_use_is_one_sentence() -> None:
    async def check() -> None:
        server = await start()
        try:
            with pytest.raises(ConfigError, match=f"{server.address}: the port is in use"):
                await start(server.address)
        finally:
            await server.stop(0)

    asyncio.run(check())


def test_a_port_is_free_again_after_stop() -> None:
    async def check() -> None:
        server = await start()
        await server.stop(0)
        again = await start(server.address)
        assert again.address == server.address
        await again.stop(0)

    asyncio.run(check())


def test_a_connection_without_a_call_is_closed() -> None:
    async def check() -> None:
        server = await start(limits=ServerLimits(idle_timeout_s=0.1))
        async with raw_connection(server.address) as connection:
            kinds = [frame.kind async for frame in connection.frames()]
            assert GOAWAY in kinds
        await server.stop(0)

    asyncio.run(asyncio.wait_for(check(), 20))
