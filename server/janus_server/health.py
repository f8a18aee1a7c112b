"""The standard health service.

The one that gRPC brings holds a lock while it writes to a watcher, so that a watcher which does not
read would stop every change of a status, and the server's end with it.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

_Response = health_pb2.HealthCheckResponse


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Says of the server as a whole ("") and of each of its services whether they serve."""

    def __init__(self, service_names: Sequence[str]) -> None:
        self._names = frozenset(("", *service_names))
        self._status = _Response.NOT_SERVING
        self._changed = asyncio.Event()

    def set_serving(self, serving: bool) -> None:
        """Publish whether they serve."""
        self._status = _Response.SERVING if serving else _Response.NOT_SERVING
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def Check(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        """Return the status now."""
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such service here")
        return _Response(status=self._status)

    async def Watch(
        self, request: Any, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[Any]:
        """Stream the status now and after each change."""
        while True:
            # Taken before the status is read, so that no change falls between the two.
            changed = self._changed
            is_known = request.service in self._names
            yield _Response(status=self._status if is_known else _Response.SERVICE_UNKNOWN)
            await changed.wait()
