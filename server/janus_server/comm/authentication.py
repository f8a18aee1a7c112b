"""The secret of a cluster: its processes show it in every call to the controller or a worker.

A server that has one refuses calls without it before it reads their message; a server that has none
refuses calls that show one, as their process would refuse its own. What travels is a token made
from the secret, in the clear: it keeps out who cannot listen to the traffic.
"""

import hmac
import logging
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import grpc
import grpc.aio

from janus_server.addresses import is_loopback
from janus_server.comm.config import CommConfig
from janus_server.errors import ConfigError
from janus_server.grpc_server import RunningServer, start_server
from janus_server.input_file import read_file

logger = logging.getLogger(__name__)

MIN_SECRET_BYTES = 16
"""Shorter secrets can be guessed."""
_MAX_FILE_BYTES = 2**20

_METADATA_KEY = "janus-cluster-token"

_HOW_TO = "`(umask 077; openssl rand -hex 32 > FILE)` makes a secret"

Metadata = tuple[tuple[str, str], ...]


class ClusterSecret:
    """What the processes of one cluster know and nobody else does."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._token = hmac.digest(secret, b"janus cluster token", "sha256").hex()

    @classmethod
    def generate(cls) -> "ClusterSecret":
        """A new one."""
        return cls(secrets.token_hex(32).encode())

    @property
    def metadata(self) -> Metadata:
        """What a call carries to show the secret."""
        return ((_METADATA_KEY, self._token),)

    def is_shown_by(self, metadata: Iterable[tuple[str, str | bytes]]) -> bool:
        """Whether a call that carries `metadata` shows it; takes as long whether it does or not."""
        return any(
            key == _METADATA_KEY and hmac.compare_digest(_bytes(value), self._token.encode())
            for key, value in metadata
        )

    def file_for_children(self) -> IO[bytes]:
        """Write it into a file in memory.

        Child processes that inherit the file's descriptor read it at /dev/fd/NUMBER: neither their
        command lines nor their environments show the secret.
        """
        file = os.fdopen(os.memfd_create("janus-cluster-secret"), "wb")
        os.fchmod(file.fileno(), 0o600)
        file.write(self._secret)
        file.flush()
        return file


def read_secret(config: CommConfig) -> ClusterSecret | None:
    """The secret in the file that the configuration names; None: it names none.

    Raises ConfigError where the file cannot be read, or other users can read it.
    """
    if not config.cluster_secret_file:
        return None
    path = Path(config.cluster_secret_file)
    secret = read_file(path, ConfigError, max_bytes=_MAX_FILE_BYTES).strip()
    if path.stat().st_mode & (stat.S_IRWXO | stat.S_IWGRP):
        raise ConfigError(
            f"other users may read or change the secret in {path}: make a new one; {_HOW_TO}"
        )
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(
            f"the secret in {path} has {len(secret)} characters, fewer than {MIN_SECRET_BYTES}, "
            f"and can be guessed; {_HOW_TO}"
        )
    return ClusterSecret(secret)


def metadata_of(secret: ClusterSecret | None) -> Metadata:
    """What the calls of a process carry that was given `secret`."""
    return secret.metadata if secret else ()


async def start_internal_server(
    add_services: Callable[[grpc.aio.Server], None],
    service_names: Sequence[str],
    listen: str,
    secret: ClusterSecret | None,
) -> RunningServer:
    """Start a server, as `start_server` does, that only processes with `secret` may call.

    Without one it serves every user of this machine, with a warning, and listens on no other
    address than loopback: raises ConfigError there.
    """
    if secret is None:
        if not is_loopback(listen):
            raise ConfigError(
                f"refused to listen on {listen} without --cluster-secret-file: whoever reaches it "
                f"could read prompts and answer in the place of a worker; {_HOW_TO}"
            )
        logger.warning(
            "no --cluster-secret-file: every user of this machine may act as a process of this "
            "cluster"
        )
    guard = _SecretGuard(secret)
    return await start_server(add_services, service_names, listen, interceptors=[guard])


class _SecretGuard(grpc.aio.ServerInterceptor):
    """Refuses calls of processes that do not have the same secret, or none, whatever the method."""

    def __init__(self, secret: ClusterSecret | None) -> None:
        self._secret = secret
        self._complaint = _SECRET_IS_MISSING if secret is not None else _SECRET_IS_UNASKED
        self._has_refused = False

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Let a call of the same cluster through to its handler."""
        if self._is_of_cluster(handler_call_details.invocation_metadata or ()):
            return await continuation(handler_call_details)
        if not self._has_refused:
            self._has_refused = True
            logger.warning(
                "refused a call of %r, more are refused silently: %s",
                handler_call_details.method,
                self._complaint,
            )
        return _REFUSALS[self._complaint]

    def _is_of_cluster(self, metadata: Iterable[tuple[str, str | bytes]]) -> bool:
        if self._secret is None:
            return all(key != _METADATA_KEY for key, _ in metadata)
        return self._secret.is_shown_by(metadata)


def _refusal(complaint: str) -> Any:
    async def refuse(requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, complaint)

    # Of a method that reads a stream nothing is read before the handler asks for it.
    handler: Any = refuse
    return grpc.stream_stream_rpc_method_handler(handler)


_SECRET_IS_MISSING = (
    "the call does not show the secret of this cluster: all its processes need the same "
    "--cluster-secret-file"
)
_SECRET_IS_UNASKED = (
    "the call shows a secret, but the process that it reached was given none: all processes of a "
    "cluster need the same --cluster-secret-file"
)
_REFUSALS = {
    complaint: _refusal(complaint) for complaint in (_SECRET_IS_MISSING, _SECRET_IS_UNASKED)
}


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode(errors="replace")
