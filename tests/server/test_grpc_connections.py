import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import grpc.aio
import pytest

from janus_proto.v1 import control_pb2, control_pb2_grpc
from janus_server.grpc_server import RunningServer, ServerLimits, channel_options, start_server
from tests.fakes.http2 import CONTINUATION, HEADERS, RawConnection, raw_connection

HEADER = b"\x00\x01a\x01b"
MANY_HEADERS = HEADER * 3000
REQUEST_BYTES = 4 * 2**20


class FakeControlService(control_pb2_grpc.ControlServiceServicer):
    async def Register(self, request, context):
        return control_pb2.RegisterResponse(worker_id=str(len(request.address)))


@contextlib.asynccontextmanager
async def started(listen: str = "127.0.0.1:0") -> AsyncIterator[RunningServer]:
    server = await start_server(
        lambda server: control_pb2_grpc.add_ControlServiceServicer_to_server(
            FakeControlService(), server
        ),
        [],
        listen,
        ServerLimits(max_request_bytes=REQUEST_BYTES + 1000),
    )
    try:
        yield server
    finally:
        await server.stop(0)


async def flood(connection: RawConnection) -> None:
    with contextlib.suppress(ConnectionError):
        await connection.send(HEADERS, HEADER, stream=1)
        while True:
            await connection.send(CONTINUATION, MANY_HEADERS, stream=1)


async def flood_until_closed(address: str) -> None:
    async with raw_connection(address) as connection, asyncio.timeout(30):
        flooding = asyncio.create_task(flood(connection))
        async for _ in connection.frames():
            pass
        await flooding


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "[::1]:0"])
def test_headers_without_end_end_their_connection(listen: str) -> None:
    async def check() -> None:
        async with started(listen) as server:
            await flood_until_closed(server.address.replace("[::1]", "::1"))
            assert server.connections.num_closed == 1

    asyncio.run(check())


def test_a_connection_is_found_behind_a_hundred_servers() -> None:
    async def check() -> None:
        others = [grpc.aio.server() for _ in range(101)]
        for other in others:
            other.add_insecure_port("127.0.0.1:0")
            await other.start()
        for _ in range(2):  # gRPC numbers servers when it is first asked for them
            async with started() as server:
                await flood_until_closed(server.address)
                assert server.connections.num_closed == 1
        for other in others:
            await other.stop(None)

    asyncio.run(check())


def test_many_floods_are_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def check() -> None:
        async with started() as server:
            await asyncio.gather(*(flood_until_closed(server.address) for _ in range(8)))
            assert server.connections.num_closed == 8

    with caplog.at_level(logging.WARNING):
        asyncio.run(check())
    (message,) = caplog.messages
    assert message.startswith("closed the connection of ipv4:127.0.0.1:")


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "[::1]:0"])
def test_large_requests_at_once_keep_their_connection(listen: str) -> None:
    async def check() -> None:
        async with (
            started(listen) as server,
            grpc.aio.insecure_channel(server.address, options=channel_options()) as channel,
        ):
            stub = control_pb2_grpc.ControlServiceStub(channel)
            request = control_pb2.RegisterRequest(address="x" * REQUEST_BYTES)
            responses = await asyncio.gather(*(stub.Register(request) for _ in range(30)))
            assert {response.worker_id for response in responses} == {str(REQUEST_BYTES)}
            assert server.connections.num_closed == 0

    asyncio.run(check())


def test_requests_that_are_cancelled_and_calls_of_no_method_keep_their_connection() -> None:
    async def check() -> None:
        async with (
            started() as server,
            grpc.aio.insecure_channel(server.address, options=channel_options()) as channel,
        ):
            stub = control_pb2_grpc.ControlServiceStub(channel)
            request = control_pb2.RegisterRequest(address="x" * REQUEST_BYTES)
            unknown = channel.unary_unary("/no/Such")
            for _ in range(20):
                calls = [stub.Register(request) for _ in range(5)]
                calls += [unknown(b"x" * 2**20) for _ in range(5)]
                await asyncio.sleep(0.02)
                for call in calls:
                    call.cancel()
            await stub.Register(request)
            assert server.connections.num_closed == 0

    asyncio.run(check())


def test_more_calls_than_one_look_sees_keep_their_connection() -> None:
    async def check() -> None:
        async with (
            started() as server,
            grpc.aio.insecure_channel(server.address, options=channel_options()) as channel,
        ):
            stub = control_pb2_grpc.ControlServiceStub(channel)
            request = control_pb2.RegisterRequest(address="x" * 2000)
            metadata = (("long", "y" * 8000),)
            await asyncio.gather(*(stub.Register(request, metadata=metadata) for _ in range(1000)))
            assert server.connections.num_closed == 0

    asyncio.run(check())
