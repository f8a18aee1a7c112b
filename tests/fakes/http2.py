"""A hand-made HTTP/2 client: it can say what no gRPC library says."""

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = (
    0,
    1,
    3,
    4,
    6,
    7,
    8,
    9,
)
END_STREAM, ACK, END_HEADERS = 0x1, 0x1, 0x4
INITIAL_WINDOW_SIZE = 4
_FRAME_OVERHEAD = 9


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """What the server sent."""

    kind: int
    flags: int
    stream: int
    payload: bytes


class RawConnection:
    """One connection; answers nothing by itself."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def send(
        self, kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 0
    ) -> None:
        """Send one frame."""
        head = struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream)
        self._writer.write(head + payload)
        await self._writer.drain()

    async def call(
        self,
        stream: int,
        path: bytes,
        message: bytes | None = None,
        *,
        headers: Iterable[tuple[bytes, bytes]] = (),
    ) -> None:
        """Begin a gRPC call; with a message, send it and end the request."""
        block = b"".join(
            b"\x00" + _string(name) + _string(value)
            for name, value in (
                (b":method", b"POST"),
                (b":scheme", b"http"),
                (b":path", path),
                (b":authority", b"test"),
                (b"te", b"trailers"),
                (b"content-type", b"application/grpc"),
                *headers,
            )
        )
        await self.send(HEADERS, block, flags=END_HEADERS, stream=stream)
        if message is not None:
            body = b"\x00" + struct.pack(">I", len(message)) + message
            await self.send(DATA, body, flags=END_STREAM, stream=stream)

    async def frames(self) -> AsyncIterator[Frame]:
        """What the server sends, until it closes the connection."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await self._reader.readexactly(_FRAME_OVERHEAD)
                length = int.from_bytes(head[:3], "big")
                kind, flags, stream = struct.unpack(">BBI", head[3:])
                payload = await self._reader.readexactly(length)
                yield Frame(kind=kind, flags=flags, stream=stream, payload=payload)


@contextlib.asynccontextmanager
async def raw_connection(address: str, *, window: int = 65535) -> AsyncIterator[RawConnection]:
    """Connect and say hello, with this many bytes as what the server may send on a stream."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        connection = RawConnection(reader, writer)
        await connection.send(SETTINGS, struct.pack(">HI", INITIAL_WINDOW_SIZE, window))
        yield connection
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def _string(value: bytes) -> bytes:
    if len(value) < 127:
        return bytes([len(value)]) + value
    rest, digits = len(value) - 127, b"\x7f"
    while rest >= 128:
        digits += bytes([rest & 127 | 128])
        rest >>= 7
    return digits + bytes([rest]) + value
