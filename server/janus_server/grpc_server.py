"""One gRPC server of a Janus process, with the standard health and reflection services on it.

Every server and every channel of the project uses the options of this file, so that both ends agree
on message sizes and on how often a silent connection may be pinged.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from janus_server.addresses import check_can_listen, join_address
from janus_server.errors import ConfigError
from janus_server.grpc_acceptor import new_server
from janus_server.grpc_calls import CallGuard, CheckBytes
from janus_server.grpc_connections import ConnectionWatch
from janus_server.health import HealthService

MAX_MESSAGE_BYTES = 64 * 2**20
"""Largest message in either direction, in bytes: the routing trace of a long request fits."""

MAX_METADATA_BYTES = 16 * 2**10
"""Largest metadata of a call, in bytes, counted as HTTP/2 does."""

_KEEPALIVE_INTERVAL_MS = 30_000
_KEEPALIVE_TIMEOUT_MS = 10_000
_MAX_UNREAD_CALLS = 8192
"""Calls that may wait to be looked at, so that a burst of them gets proper statuses. gRPC cancels
those beyond without a word, by default some beyond 1000 and all beyond 3000."""
_CLOSE_TIMEOUT_S = 1.0
"""How long connections may take to close once their calls have ended, in seconds."""
_HANDSHAKE_TIMEOUT_MS = 10_000
"""How long a new connection may take to say that it speaks HTTP/2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerLimits:
    """What the clients of a server may ask of it; by default what processes of one cluster may."""

    max_request_bytes: int = MAX_MESSAGE_BYTES
    """Largest request, after decompression."""

    max_connections: int = 4096
    """Connections at once; one more is closed at once."""

    max_streams: int = 4096
    """Calls at once over one connection; clients hold one more back."""

    max_calls_per_method: int = 4096
    """Calls at once of one method over all connections; one more is refused. An idle call takes
    about 30 KB."""

    idle_timeout_s: float = 300.0
    """A connection without a call is closed after so long."""

    request_timeout_s: float = 30.0
    """How long a call that was begun may take to bring its whole request."""

    stall_timeout_s: float = 30.0
    """A stream whose client takes no message for longer is cut."""

    check_bytes: CheckBytes = field(default=lambda data: None)
    """Looks at every request before it is parsed."""


def channel_options() -> list[tuple[str, Any]]:
    """Return the options of every client channel between Janus processes."""
    return [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", _KEEPALIVE_INTERVAL_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # A peer that is still starting is tried again soon.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
        # Processes of one cluster never talk through a proxy of the environment.
        ("grpc.enable_http_proxy", 0),
    ]


def _server_options(limits: ServerLimits) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", limits.max_request_bytes),
        # What is not read yet takes 64 KiB of a connection rather than the megabytes of each stream
        # that gRPC would offer a fast network.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.max_allowed_incoming_connections", limits.max_connections),
        ("grpc.max_concurrent_streams", limits.max_streams),
        # Both pairs are equal, because between the two a call would be refused at random.
        ("grpc.server.max_pending_requests", _MAX_UNREAD_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", _MAX_UNREAD_CALLS),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        # The statistics by which connections are judged.
        ("grpc.enable_channelz", 1),
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_TIMEOUT_MS),
        # Two servers on one port would each get a share of the connections; we want an error.
        ("grpc.so_reuseport", 0),
        # A client that answers no ping, such as a stopped process, loses its connection.
        ("grpc.keepalive_time_ms", _KEEPALIVE_INTERVAL_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
        # One that has no call makes room for others; gRPC's clients connect anew for the next.
        ("grpc.max_connection_idle_ms", round(limits.idle_timeout_s * 1000)),
        # Clients may ping a silent connection this often without being cut off.
        ("grpc.http2.min_ping_interval_without_data_ms", 1000),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.keepalive_permit_without_calls", 1),
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningServer:
    """A started server; not serving, as its health service says, until `set_serving(True)`."""

    server: grpc.aio.Server
    address: str
    """HOST:PORT that is really bound."""
    health: HealthService
    guard: CallGuard
    connections: ConnectionWatch
    watching: asyncio.Task[NoReturn]

    def set_serving(self, serving: bool) -> None:
        """Publish whether the server as a whole and each of its services can do its work."""
        self.health.set_serving(serving)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls at once, let running ones end for `grace_s` seconds, cancel the rest."""
        self.health.set_serving(False)
        # A client that takes nothing keeps the end of its connection from being written.
        stopping = asyncio.ensure_future(self.server.stop(grace_s))
        await asyncio.wait({stopping}, timeout=grace_s + _CLOSE_TIMEOUT_S)
        self.watching.cancel()


async def start_server(
    add_services: Callable[[grpc.aio.Server], None],
    service_names: Sequence[str],
    listen: str,
    limits: ServerLimits | None = None,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
) -> RunningServer:
    """Start a server on `listen` with what `add_services` adds, health and reflection.

    `service_names` are the full names ("janus.v1.ControlService"); `listen` is HOST:PORT, where
    port 0 takes a free one. Every call passes `interceptors` first. Raises ConfigError where it
    cannot listen there.
    """
    limits = limits or ServerLimits()
    host, _ = check_can_listen(listen)
    guard = CallGuard(
        limits.check_bytes,
        request_timeout_s=limits.request_timeout_s,
        stall_timeout_s=limits.stall_timeout_s,
        max_calls_per_method=limits.max_calls_per_method,
    )
    server = new_server(_server_options(limits), [*interceptors, guard])
    health = HealthService(service_names)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
    names = (*service_names, health_name, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    add_services(server)
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError:
        raise ConfigError(f"cannot listen on {listen}") from None
    await server.start()
    connections = ConnectionWatch(
        port,
        guard.reads,
        max_metadata_bytes=MAX_METADATA_BYTES,
        max_request_bytes=limits.max_request_bytes,
    )
    return RunningServer(
        server=server,
        address=join_address(host, port),
        health=health,
        guard=guard,
        connections=connections,
        watching=asyncio.create_task(connections.run(), name="connections"),
    )
