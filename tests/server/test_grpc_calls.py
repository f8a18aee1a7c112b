"""What hostile calls get, on every service alike."""

import asyncio
import contextlib
import gc
import logging
import struct
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, ClassVar

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from janus_proto.v1 import control_pb2, control_pb2_grpc, inference_pb2, worker_pb2
from janus_proto.v1.inference_pb2_grpc import (
    InferenceServiceServicer,
    add_InferenceServiceServicer_to_server,
)
from janus_proto.v1.worker_pb2_grpc import (
    AttentionWorkerServiceServicer,
    add_AttentionWorkerServiceServicer_to_server,
)
from janus_server.errors import InvalidRequestError, StalledClientError, UnavailableError
from janus_server.grpc_server import RunningServer, ServerLimits, start_server
from tests.fakes.endpoint import CALL_S, until, within_deadline
from tests.fakes.http2 import (
    DATA,
    END_STREAM,
    HEADERS,
    RST_STREAM,
    WINDOW_UPDATE,
    RawConnection,
    raw_connection,
)

Code = grpc.StatusCode
GENERATE = "/janus.v1.InferenceService/Generate"
ABORT = "/janus.v1.InferenceService/Abort"
NO_MESSAGE = b"\xff\xff\xff"
LIMIT = 10_000

METHODS: list[MethodDescriptor] = [
    method
    for module in (control_pb2, worker_pb2, inference_pb2, health_pb2, reflection_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


class Held:
    """Stands for what a handler holds while it runs."""


class Inference(InferenceServiceServicer):
    """Behaves as the request's text says."""

    held: ClassVar[list[weakref.ref[Held]]] = []

    ended: ClassVar[list[type]] = []
    """What ended the streams that were to last."""

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        if request.text == "go on":
            try:
                while True:
                    yield inference_pb2.GenerateResponse(text="x" * 1000)
            except BaseException as error:
                self.ended.append(type(error))  # an error itself would keep the call
                raise
        yield inference_pb2.GenerateResponse(text="first")
        if request.text == "unavailable":
            raise UnavailableError("no worker")
        if request.text == "bug":
            raise KeyError("secret")

    async def Abort(self, request: Any, context: Any) -> Any:
        held = Held()
        self.held.append(weakref.ref(held))
        if request.request_id == "refused":
            raise InvalidRequestError("refused")
        if request.request_id == "unknown":
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown")
        return inference_pb2.AbortResponse()


class Worker(AttentionWorkerServiceServicer):
    async def Run(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        async for request in request_iterator:
            yield worker_pb2.RunResponse(step=len(request.submit.prompt_ids))


def add_services(server: grpc.aio.Server) -> None:
    control_pb2_grpc.add_ControlServiceServicer_to_server(
        control_pb2_grpc.ControlServiceServicer(), server
    )
    add_AttentionWorkerServiceServicer_to_server(Worker(), server)
    add_InferenceServiceServicer_to_server(Inference(), server)


def with_server(
    scenario: Callable[[RunningServer, grpc.aio.Channel], Coroutine[Any, Any, None]],
    limits: ServerLimits | None = None,
    options: list[tuple[str, Any]] | None = None,
) -> None:
    """Run a test with a server of all services and a channel without limits of its own."""

    async def run() -> None:
        server = await start_server(add_services, [], "127.0.0.1:0", limits)
        try:
            async with grpc.aio.insecure_channel(
                server.address, [*(options or []), ("grpc.max_send_message_length", -1)]
            ) as channel:
                await scenario(server, channel)
        finally:
            await server.stop(0)

    within_deadline(run())


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    async def end() -> None:
        while hasattr(call, "read") and await call.read() is not grpc.aio.EOF:
            pass
        await call

    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await end()
    return raised.value.code(), raised.value.details() or ""


async def end_of(connection: RawConnection, stream: int) -> int:
    """By which kind of frame the server ends a stream."""
    async for frame in connection.frames():
        is_last = frame.kind == HEADERS and frame.flags & END_STREAM
        if frame.stream == stream and (is_last or frame.kind == RST_STREAM):
            return frame.kind
    raise AssertionError("it closed the connection")


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Warnings and worse, but for gRPC's about the event loops of other tests."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.WARNING and record.name != "asyncio"
    ]


async def end_of_stalled(connection: RawConnection, channel: grpc.aio.Channel) -> int:
    """How the one stream ends. gRPC keeps a call until it has accepted the next one of any kind."""
    ending = asyncio.create_task(end_of(connection, 1))
    while not ending.done():
        assert await channel.unary_unary(ABORT)(b"", timeout=CALL_S) == b""
        await asyncio.sleep(0.05)
    return ending.result()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
def test_bytes_that_are_no_message(
    method: MethodDescriptor, caplog: pytest.LogCaptureFixture
) -> None:
    assert method.containing_service is not None
    path = f"/{method.containing_service.full_name}/{method.name}"

    async def scenario(server: RunningServer, channel: grpc.aio.Channel) -> None:
        call: Any
        if method.client_streaming:
            call = channel.stream_stream(path)(iter([NO_MESSAGE]), timeout=CALL_S)
        elif method.server_streaming:
            call = channel.unary_stream(path)(NO_MESSAGE, timeout=CALL_S)
        else:
            call = channel.unary_unary(path)(NO_MESSAGE, timeout=CALL_S)
        code, sentence = await refusal(call)
        assert code is Code.INVALID_ARGUMENT
        assert sentence.startswith("the request is no valid message")

    with_server(scenario)
    assert logged(caplog) == []


def test_a_text_that_is_not_utf8() -> None:
    async def scenario(server: RunningServer, channel: grpc.aio.Channel) -> None:
        code, _ = await refusal(channel.unary_stream(GENERATE)(b"\x12\x02\xc3\x28"))
        assert code is Code.INVALID_ARGUMENT

    with_server(scenario)


def test_a_stream_serves_until_the_message_that_is_none() -> None:
    async def scenario(server: RunningServer, channel: grpc.aio.Channel) -> None:
        call: Any = channel.stream_stream("/janus.v1.AttentionWorkerService/Run")(
            iter([b"", NO_MESSAGE, b""])
        )
        assert await call.read() == b""
        assert (await refusal(call))[0] is Code.INVALID_ARGUMENT

    with_server(scenario)


def test_an_unknown_method() -> None:
    async def scenario(server: RunningServer, channel: grpc.aio.Channel) -> None:
        for path in ("/janus.v1.InferenceService/Nothing", "/nobody/Nothing", "/", "x"):
            assert (await refusal(channel.unary_unary(path)(b"")))[0] is Code.UNIMPLEMENTED

    with_server(scenario)


def test_a_call_without_a_request() -> None:
    async def scenario(server: RunningServer, channel: grpc.aio.Channel) -> None:
        for path in (GENERATE, ABORT):
            call = channel.stream_stream(path)(iter([]), timeout=CALL_S)
            assert await refusal(call) == (Code.INVALID_ARGUMENT, "the call has no request")

    with_server(scenario)


def test_a_request_that_never_comes_whole() -> None:
    async def scenario(server: RunningServer, channel: grpc.aio.Channel) -> None:
        for data in (b"", b"\x00\x00\x00", b"\x00\x00\x00\x00\x09half"):
            async with raw_connection(server.address) as connection:
                await connection.call(1, ABORT.encode())
                await connection.send(DATA, data, stream=1)
                assert await end_of(connection, 1) == HEADERS

    with_server(scenario, ServerLimits(request_timeout_s=0.1))


def test_a_second_request_of_a_call_is_not_read() -> None:
    async def scenario(server: RunningServer, channel: grpc.aio.Channel) -> None:
        call: Any = channel.stream_unary(ABORT)(iter([b"", NO_MESSAGE]), timeout=CALL_S)
        assert await call == b""

    with_server(scenario)


@pytest.mark.parametrize(
    "algorithm", [grpc.Compression.NoCompression, grpc.Compression.Gzip, grpc.Compression.Deflate]
)
def test_a_large_request_is_refused_compressed_or_not(algorithm: grpc.Compression) -> None:
    async def scenario(server: RunningServer, channel: grpc.aio.Channel) -> None:
        bomb = b"\x12\x90\x4e" + bytes(LIMIT)
        for path in (GENERATE, ABORT):
            code, sentence = await refusal(
                channel.unary_stream(path)(bomb, timeout=CALL_S, compression=algorithm)
            )
            assert code is Code.RESOURCE_EXHAUSTED
            assert str(LIMIT) in sentence
        small = bytes([0x12, 100]) + bytes(100)
        call: Any = channel.unary_stream(GENERATE)(small, compression=algorithm)
        assert await call.read() == inference_pb2.GenerateResponse(text="first").SerializeToString()

    with_server(scenario, ServerLimits(max_request_bytes=LIMIT))


def test_what_check_bytes_refuses_is_not_parsed() -> None:
    def check(data: bytes) -> None:
        raise InvalidRequestError(f"{len(data)} bytes")

    async def scenario(server: RunningServer, channel: grpc.aio.Channel) -> None:
        call = channel.unary_unary(ABORT)(NO_MESSAGE)
        assert await refusal(call) == (Code.INVALID_ARGUMENT, "3 bytes")

    with_server(scenario, ServerLimits(check_bytes=check))


def test_an_expired_deadline(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(server: RunningServer, channel: grpc.aio.Channel) -> None:
        for timeout in (b"0n", b"1n", b"-1S", b"x", b"99999999999H"):
            async with raw_connection(server.address) as connection:
                await connection.call(1, ABORT.encode(), b"", headers=[(b"grpc-timeout", timeout)])
                assert await end_of(connection, 1) in (HEADERS, RST_STREAM)
        assert await channel.unary_unary(ABORT)(b"", timeout=CALL_S) == b""

    with_server(scenario)
    assert logged(caplog) == []


def test_errors_of_handlers_are_statuses(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(server: RunningServer, channel: grpc.aio.Channel) -> None:
        abort = inference_pb2.AbortRequest(request_id="refused").SerializeToString()
        call: Any = channel.unary_unary(ABORT)(abort)
        assert await refusal(call) == (Code.INVALID_ARGUMENT, "refused")
        generate = inference_pb2.GenerateRequest(text="unavailable").SerializeToString()
        call = channel.unary_stream(GENERATE)(generate)
        assert await refusal(call) == (Code.UNAVAILABLE, "no worker")
        assert logged(caplog) == []
        generate = inference_pb2.GenerateRequest(text="bug").SerializeToString()
        code, sentence = await refusal(channel.unary_stream(GENERATE)(generate))
        assert code is Code.INTERNAL
        assert "secret" not in sentence
        assert logged(caplog) == [f"a call of {GENERATE} failed"]

    with_server(scenario)


@pytest.mark.parametrize("window", [0, 10_000], ids=["its first message", "a later one"])
def test_a_client_that_takes_nothing_is_cut(window: int, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(server: RunningServer, channel: grpc.aio.Channel) -> None:
        Inference.ended.clear()
        data = inference_pb2.GenerateRequest(text="go on").SerializeToString()
        async with raw_connection(server.address, window=window) as connection:
            await connection.call(1, GENERATE.encode(), data)
            await until(lambda: server.guard.num_stalled == 1)
            assert Inference.ended == [StalledClientError]
            # It takes no status either.
            assert await end_of_stalled(connection, channel) in (HEADERS, RST_STREAM)

    with_server(scenario, ServerLimits(stall_timeout_s=0.1))
    sentence = f"cut a call of {GENERATE}: the client took no message for 0.1 s"
    assert logged(caplog) == [sentence]


def test_a_client_that_reads_on_late_is_told() -> None:
    async def scenario(server: RunningServer, channel: grpc.aio.Channel) -> None:
        data = inference_pb2.GenerateRequest(text="go on").SerializeToString()
        async with raw_connection(server.address, window=0) as connection:
            await connection.call(1, GENERATE.encode(), data)
            await until(lambda: server.guard.num_stalled == 1)
            await connection.send(WINDOW_UPDATE, struct.pack(">I", 2**20), stream=1)
            assert await end_of(connection, 1) == HEADERS

    with_server(scenario, ServerLimits(stall_timeout_s=1))


def test_a_unary_answer_that_is_not_taken() -> None:
    async def scenario(server: RunningServer, channel: grpc.aio.Channel) -> None:
        async with raw_connection(server.address, window=0) as connection:
            await connection.call(1, ABORT.encode(), b"")
            assert await end_of_stalled(connection, channel) in (HEADERS, RST_STREAM)
        assert server.guard.num_stalled == 1

    with_server(scenario, ServerLimits(stall_timeout_s=0.1))


@pytest.mark.parametrize("request_id", ["", "refused", "unknown"])
def test_what_a_handler_held_is_free_when_the_call_has_ended(request_id: str) -> None:
    async def scenario(server: RunningServer, channel: grpc.aio.Channel) -> None:
        Inference.held.clear()
        data = inference_pb2.AbortRequest(request_id=request_id).SerializeToString()
        gc.disable()  # it would free what refers to itself as well, but late
        try:
            with contextlib.suppress(grpc.aio.AioRpcError):
                await channel.unary_unary(ABORT)(data, timeout=CALL_S)
            await until(lambda: [held() for held in Inference.held] == [None])
        finally:
            gc.enable()

    with_server(scenario)


def test_large_metadata_is_refused() -> None:
    async def scenario(server: RunningServer, channel: grpc.aio.Channel) -> None:
        metadata = (("x", "a" * 20_000),)
        code, _ = await refusal(channel.unary_unary(ABORT)(b"", metadata=metadata))
        assert code is Code.RESOURCE_EXHAUSTED
        assert await channel.unary_unary(ABORT)(b"", metadata=(("x", "a" * 8_000),)) == b""

    with_server(scenario, options=[("grpc.max_metadata_size", 2**20)])


def test_connections_beyond_the_limit_are_closed() -> None:
    async def scenario(server: RunningServer, channel: grpc.aio.Channel) -> None:
        assert await channel.unary_unary(ABORT)(b"", timeout=CALL_S) == b""
        with contextlib.suppress(ConnectionError):
            async with raw_connection(server.address) as second:
                assert [frame async for frame in second.frames()] == []
        assert await channel.unary_unary(ABORT)(b"", timeout=CALL_S) == b""

    with_server(scenario, ServerLimits(max_connections=1))


def test_calls_of_a_method_beyond_the_limit_are_refused() -> None:
    async def scenario(server: RunningServer, channel: grpc.aio.Channel) -> None:
        watch = channel.unary_stream("/grpc.health.v1.Health/Watch")
        watchers = [watch(b"", timeout=CALL_S) for _ in range(2)]
        for watcher in watchers:
            await watcher.read()
        code, sentence = await refusal(watch(b"", timeout=CALL_S))
        assert code is Code.RESOURCE_EXHAUSTED
        assert sentence == "2 calls of this method are open; try again later"
        assert await channel.unary_unary(ABORT)(b"", timeout=CALL_S) == b""
        watchers.pop().cancel()
        while True:  # the server learns a little later that a place is free
            watcher = watch(b"", timeout=CALL_S)
            with contextlib.suppress(grpc.aio.AioRpcError):
                assert await watcher.read()
                break

    with_server(scenario, ServerLimits(max_calls_per_method=2))


def test_a_burst_of_calls_is_answered() -> None:
    """gRPC would cancel some of what waits to be looked at."""

    async def scenario(server: RunningServer, channel: grpc.aio.Channel) -> None:
        abort = channel.unary_unary(ABORT)
        calls = [abort(b"", timeout=CALL_S) for _ in range(3500)]
        assert set(await asyncio.gather(*calls)) == {b""}

    with_server(scenario)


def test_a_path_that_is_no_text() -> None:
    async def scenario(server: RunningServer, channel: grpc.aio.Channel) -> None:
        for path in (b"\xff\xfe", b"/\xc3\x28/x", b"", b"/" + b"x" * 10_000, b"/a\x00b/c"):
            async with raw_connection(server.address) as connection:
                await connection.call(1, path, b"")
                assert await end_of(connection, 1) in (HEADERS, RST_STREAM)
        assert await channel.unary_unary(ABORT)(b"", timeout=CALL_S) == b""

    with_server(scenario)
