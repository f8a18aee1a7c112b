import asyncio
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from janus_server import telemetry
from janus_server.grpc_server import start_server
from tests.fakes.http2 import raw_connection

SENDS_BAD_HEADERS = """
import asyncio
from janus_server.grpc_server import start_server
from tests.fakes.http2 import raw_connection

async def check():
    server = await start_server(lambda grpc_server: None, [], "127.0.0.1:0")
    async with raw_connection(server.address) as connection:
        bad = [(b":status", b"x"), (b"grpc-timeout", b"x")] * 100
        await connection.call(1, b"/grpc.health.v1.Health/Check", b"", headers=bad)
        async for frame in connection.frames():
            if frame.stream == 1:
                break
        else:
            raise AssertionError("the call was not answered")
    await server.stop(0)

asyncio.run(asyncio.wait_for(check(), 20))
"""
CYGRPC = logging.getLogger("grpc._cython.cygrpc")


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
        async with raw_connection(server.address) as connection:
            await connection.call(
                1, b"/grpc.health.v1.Health/Check", b"", headers=[(b"x", b"\xff\xfe")]
            )
            async for frame in connection.frames():
                if b"grpc-status" in frame.payload:
                    break
            else:
                raise AssertionError("the call was not answered")
        await server.stop(0)

    if is_configured:
        request.getfixturevalue("configured")
    asyncio.run(asyncio.wait_for(check(), 20))
    assert ["Invalid encoding" in message for message in caplog.messages] == (
        [] if is_configured else [True]
    )


def test_a_client_cannot_fill_the_log_with_headers_that_grpc_cannot_read() -> None:
    # In a process of its own: gRPC's core reads its settings once.
    finished = subprocess.run(
        [sys.executable, "-c", SENDS_BAD_HEADERS], capture_output=True, text=True, timeout=60
    )
    assert (finished.returncode, finished.stderr) == (0, "")


def test_what_else_grpc_says_is_logged(configured: None, caplog: pytest.LogCaptureFixture) -> None:
    CYGRPC.error("something else of %s", "gRPC's")
    assert caplog.messages == ["something else of gRPC's"]
