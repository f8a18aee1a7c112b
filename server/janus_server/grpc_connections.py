"""Closes connections that bring more bytes than their calls can need.

gRPC's core reads a connection for as long as there is something to read, each on one of few
threads, and reads a block of headers to its end, however long. Until a client confirms the settings
it also keeps 16 MiB of them. So a few clients that send headers without end keep all others
waiting. The kernel says what a connection brought, gRPC how many calls came of it.
"""

import asyncio
import contextlib
import dataclasses
import fcntl
import json
import logging
import socket
import struct
import termios
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from grpc._cython import cygrpc  # type: ignore[attr-defined]

from janus_server.byte_budget import ByteBudget, Reads, Traffic
from janus_server.glibc import give_back_freed_memory
from janus_server.own_sockets import duplicate, own_sockets

logger = logging.getLogger(__name__)

_PERIOD_S = 0.1
_LOG_PERIOD_S = 10.0
_TRIM_PERIOD_S = 1.0
_UNNOTICED_BYTES = 2**14
"""A connection that brought less than this since it was judged is not judged again."""
_DRAIN_BYTES = 2**20
_MAPPED = "::ffff:"
"""How an IPv4 address begins where a server listens on IPv6."""
_TCP_INFO_BYTES_ACKED = 120
"""Where `struct tcp_info` of Linux has the bytes sent and confirmed; those received are next."""
_TCP_INFO_BYTES = 136


@dataclass(kw_only=True, slots=True)
class _Connection:
    """An accepted connection of this process."""

    peer: str
    family: int
    budget: ByteBudget


class ConnectionWatch:
    """Looks at all connections of one server many times a second."""

    def __init__(
        self, port: int, reads: Reads, *, max_metadata_bytes: int, max_request_bytes: int
    ) -> None:
        self.num_closed = 0
        """Connections that were closed by this."""
        self._port = port
        self._reads = reads
        self._max_metadata_bytes = max_metadata_bytes
        self._max_request_bytes = max_request_bytes
        self._sockets: dict[str, _Connection | None] = {}
        """The kernel's name of a socket -> the connection, or None where it is another socket."""
        self._next_log_s = 0.0
        self._num_closed_at_trim = 0
        self._next_trim_s = 0.0

    async def run(self) -> NoReturn:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(_PERIOD_S)
            try:
                now_s = asyncio.get_running_loop().time()
                self.look(now_s)
                if self._num_closed_at_trim < self.num_closed and now_s >= self._next_trim_s:
                    self._next_trim_s = now_s + _TRIM_PERIOD_S
                    self._num_closed_at_trim = self.num_closed
                    await asyncio.to_thread(give_back_freed_memory)
            except Exception:
                logger.exception("the connections could not be looked at")
                await asyncio.sleep(_LOG_PERIOD_S)

    def look(self, now_s: float) -> None:
        """Close the connections that are over their budget."""
        fds = own_sockets()
        self._sockets = {name: known for name, known in self._sockets.items() if name in fds}
        busy: list[tuple[int, _Connection, Traffic]] = []
        for name, fd in fds.items():
            if name not in self._sockets:
                try:
                    self._sockets[name] = self._accepted(fd, now_s)
                except OSError:  # not connected yet, or no file is left; tried again
                    continue
            connection = self._sockets[name]
            if connection is None:
                continue
            traffic = _traffic(fd, connection, now_s)
            if traffic is not None and (
                traffic.received_bytes > connection.budget.last.received_bytes + _UNNOTICED_BYTES
            ):
                busy.append((fd, connection, traffic))
        self._reads.forget_all_but({known.peer for known in self._sockets.values() if known})
        if busy:
            self._judge(busy, now_s)

    def _accepted(self, fd: int, now_s: float) -> _Connection | None:
        with duplicate(fd) as copy:
            if copy.family not in (socket.AF_INET, socket.AF_INET6):
                return None
            if copy.getsockname()[1] == self._port:
                budget = ByteBudget(
                    Traffic(time_s=now_s),
                    max_metadata_bytes=self._max_metadata_bytes,
                    max_request_bytes=self._max_request_bytes,
                )
                return _Connection(peer=_peer(copy), family=copy.family, budget=budget)
        return None

    def _judge(self, busy: list[tuple[int, _Connection, Traffic]], now_s: float) -> None:
        ids = _channelz_ids()
        for fd, connection, traffic in busy:
            peer = connection.peer
            # Asked after the bytes were, so that no byte comes before its reason.
            num_streams = _num_streams(ids[peer]) if peer in ids else None
            if num_streams is None:  # gRPC does not have it yet, or any more
                continue
            traffic = dataclasses.replace(
                traffic, num_streams=num_streams, num_reads=self._reads.num_ended[peer]
            )
            num_reading = self._reads.num_waiting[peer]
            if not connection.budget.add(traffic, num_reading=num_reading):
                self._close(fd, connection, now_s)

    def _close(self, fd: int, connection: _Connection, now_s: float) -> None:
        with contextlib.suppress(OSError), duplicate(fd) as copy:
            if _peer(copy) != connection.peer:  # gRPC closed it meanwhile
                return
            # No state stays in the kernel once gRPC closes it, and nothing is left to be read.
            copy.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            copy.shutdown(socket.SHUT_RDWR)
            self.num_closed += 1
            with contextlib.suppress(OSError):
                while copy.recv(_DRAIN_BYTES, socket.MSG_DONTWAIT | socket.MSG_TRUNC):
                    pass
            if now_s >= self._next_log_s:
                self._next_log_s = now_s + _LOG_PERIOD_S
                logger.warning(
                    "closed the connection of %s: it brought %d bytes more than its calls can "
                    "need; %d connections closed so far",
                    connection.peer,
                    connection.budget.unexplained_bytes,
                    self.num_closed,
                )


def _peer(connection: socket.socket) -> str:
    """The peer's address as gRPC writes it."""
    host, port = connection.getpeername()[:2]
    if connection.family == socket.AF_INET6 and not host.startswith(_MAPPED):
        return f"ipv6:%5B{host}%5D:{port}"
    return f"ipv4:{host.removeprefix(_MAPPED)}:{port}"


def _traffic(fd: int, connection: _Connection, now_s: float) -> Traffic | None:
    """What the kernel knows of a connection; None where it is closed meanwhile."""
    with contextlib.suppress(OSError):
        # Without a duplicate, which would keep a connection open that gRPC closes.
        borrowed = socket.socket(connection.family, socket.SOCK_STREAM, fileno=fd)
        try:
            info = borrowed.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
            unread = fcntl.ioctl(borrowed, termios.FIONREAD, bytes(4))
        finally:
            borrowed.detach()
        sent, received = struct.unpack_from("=QQ", info, _TCP_INFO_BYTES_ACKED)
        received -= struct.unpack("=i", unread)[0]
        return Traffic(received_bytes=received, sent_bytes=sent, time_s=now_s)
    return None


def _channelz_ids() -> dict[str, int]:
    """Peer -> the number under which gRPC keeps the statistics of its connection."""
    ids = {}
    for server in _servers():
        for ref in _sockets(server):
            ids[ref["name"].removeprefix("chttp2 ")] = int(ref["socketId"])
    return ids


def _servers() -> Iterator[int]:
    """The numbers of all servers of this process; gRPC tells a hundred at a time."""
    number = -1
    while page := _channelz("servers", number + 1)["server"]:
        for server in page:
            number = int(server["ref"]["serverId"])
            yield number


def _sockets(server: int) -> Iterator[Mapping[str, str]]:
    """The name and number of all connections of a server."""
    number = -1
    while page := _channelz("server_sockets", server, number + 1, 0).get("socketRef"):
        for ref in page:
            number = int(ref["socketId"])
            yield ref


def _num_streams(socket_id: int) -> int | None:
    try:
        data = _channelz("socket", socket_id)["socket"]["data"]
    except ValueError:  # the connection has gone
        return None
    return int(data["streamsStarted"])


def _channelz(what: str, *arguments: int) -> Any:
    """The statistics that gRPC keeps of itself."""
    return json.loads(getattr(cygrpc, f"channelz_get_{what}")(*arguments))
