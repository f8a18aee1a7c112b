import asyncio
import logging
import struct
from collections.abc import Iterator

import pytest

from janus_server import telemetry
from janus_server.grpc_server import start_server

CYGRPC = logging.getLogger("grpc._cython.cygrpc")
_DATA, _HEADERS, _SETTINGS = 0, 1, 4
_END_STREAM, _END_HEADERS = 1, 4
EMPTY_MESSAGE = bytes(5)


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """An HTTP/2 frame."""
    return len(payload).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + payload


def header(name: bytes, value: bytes) -> bytes:
    """A header as HPACK writes one that it does not compress."""
    return bytes([0, len(name)]) + name + bytes([len(value)]) + value


CALL_WITH_A_HEADER_THAT_IS_NOT_UTF8 = frame(
    _HEADERS,
    _END_HEADERS,
    1,
    header(b":method", b"POST")
    + header(b":scheme", b"http")
    + header(b":path", b"/grpc.health.v1.Health/Check")
    + header(b":authority", b"host")
    + header(b"content-type", b"application/grpc")
    + header(b"te", b"trailers")
    + header(b"x", b"\xff\xfe"),
)


@pytest.fixture
def _unconfigured() -> Iterator[None]:
    """As if no other test had run a process that sets up the log."""
    filters, CYGRPC.filters = CYGRPC.filters, []
    yield
    CYGRPC.filters = filters


@pytest.fixture
def configured(_unconfigured: None) -> None:
    """What `configure_logging` sets up, but for the handlers, which are the test's own."""
    CYGRPC.addFilter(telemetry.is_no_header)


@pytest.mark.usefixtures("_unconfigured")
@pytest.mark.parametrize("is_configured", [False, True])
def test_a_client_cannot_fill_the_log_with_tracebacks(
    is_configured: bool, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    async def check() -> None:
        server = await start_server(lambda grpc_server: None, [], "127.0.0.1:0")
        host, port = server.address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(_SETTINGS, 0, 0, b""))
        writer.write(CALL_WITH_A_HEADER_THAT_IS_NOT_UTF8)
        writer.write(frame(_DATA, _END_STREAM, 1, EMPTY_MESSAGE))
        await asyncio.wait_for(reader.readuntil(b"grpc-status"), 20)
        writer.close()
        await server.stop(0)

    if is_configured:
        request.getfixturevalue("configured")
    asyncio.run(check())
    assert ["Invalid encoding" in message for message in caplog.messages] == (
        [] if is_configured else [True]
    )


def test_what_else_grpc_says_is_logged(configured: None, caplog: pytest.LogCaptureFixture) -> None:
    CYGRPC.error("something else of %s", "gRPC's")
    assert caplog.messages == ["something else of gRPC's"]
