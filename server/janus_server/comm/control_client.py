"""A process's side of the control service: registration, heartbeats, epochs.

Registered workers send a heartbeat an interval, and at once when their readiness changes. When the
controller has not answered for `LOST_AFTER_INTERVALS` of them, or has answered that the epoch
cannot go on, `lost` is set and stays so.
"""

import asyncio
import contextlib
import logging
import math
import os
from collections.abc import AsyncGenerator, Callable

import grpc
import grpc.aio

from janus_proto.v1 import control_pb2
from janus_proto.v1.control_pb2_grpc import ControlServiceStub
from janus_server.addresses import check_host
from janus_server.comm.authentication import ClusterSecret, Metadata, metadata_of
from janus_server.comm.epoch import check_epoch
from janus_server.comm.load_report import LoadReport
from janus_server.errors import ConfigError, UnavailableError
from janus_server.grpc_server import channel_options

logger = logging.getLogger(__name__)

LOST_AFTER_INTERVALS = 10
"""Heartbeat intervals without an answer after which the controller counts as lost."""

_ANSWER_INTERVALS = 3
"""Heartbeat intervals after which a heartbeat that was not answered counts as failed."""

_MIN_FAILURES = 3
"""Heartbeats in a row that must fail as well: one may have failed as this process was held up."""

_MAX_INTERVAL_S = 86_400.0
"""Longest time between heartbeats that a controller may ask for, in seconds."""

_RECONNECT_TIMEOUT_S = 30.0

_RECONNECT_S = 0.2
"""Pause before a stream that broke is begun anew, in seconds."""

_IS_ANOTHER = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAUTHENTICATED)
"""Answers of a controller that is not the one at which this worker registered."""

_REFUSALS = (
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.UNIMPLEMENTED,
)
"""Answers to a registration that will not change."""

_LEAVE_TIMEOUT_S = 1.0

_LOAD_DEADLINE_S = 0.5
"""How long a heartbeat waits for the load that it reports, in seconds."""


class ControlClient:
    """A connection to the controller at `address` (HOST:PORT); `close` it.

    `secret` is that of the cluster, None where it has none. Raises ConfigError where there is no
    such host.
    """

    metadata: Metadata
    """What each call to a process of this cluster carries."""

    lost: asyncio.Event
    """Set once the controller stays silent, no longer knows this worker, or ends its epoch."""

    loss: str
    """Why it is lost, in a sentence."""

    def __init__(self, address: str, secret: ClusterSecret | None = None) -> None:
        check_host(address)
        self.address = address
        self.lost = asyncio.Event()
        self.loss = ""
        self._channel = grpc.aio.insecure_channel(address, options=channel_options())
        self._stub = ControlServiceStub(self._channel)
        self.metadata = metadata_of(secret)
        self._registered = control_pb2.RegisterResponse()
        self._ready_epoch = 0
        self._wake = asyncio.Event()
        self._heartbeats: asyncio.Task[None] | None = None
        self._load_report: LoadReport | None = None

    async def register(self, worker: control_pb2.RegisterRequest, *, timeout_s: float) -> str:
        """Register this process, start its heartbeats and return its worker id.

        `worker` says all but the process id. Waits up to `timeout_s` seconds for a controller that
        is not up yet. Raises UnavailableError when it does not answer, ConfigError when it refuses.
        """
        worker.pid = os.getpid()
        response = await self._register(worker, timeout_s)
        interval_s = response.heartbeat_interval_s
        if not 0 < interval_s <= _MAX_INTERVAL_S:
            raise UnavailableError(
                f"the controller at {self.address} asks for a heartbeat every {interval_s} s"
            )
        self._registered = response
        self._heartbeats = asyncio.create_task(self._send_heartbeats(interval_s), name="heartbeats")
        self._heartbeats.add_done_callback(self._note_end_of_heartbeats)
        return response.worker_id

    async def _register(
        self, worker: control_pb2.RegisterRequest, timeout_s: float
    ) -> control_pb2.RegisterResponse:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while True:
            try:
                return await self._stub.Register(
                    worker,
                    metadata=self.metadata,
                    timeout=deadline - loop.time(),
                    wait_for_ready=True,
                )
            except grpc.aio.AioRpcError as error:
                if error.code() in _REFUSALS:
                    raise ConfigError(f"the controller refused: {error.details()}") from None
                if loop.time() + _RECONNECT_S >= deadline:
                    raise UnavailableError(
                        f"could not register with the controller at {self.address} within "
                        f"{timeout_s:.0f} s: {error.details()}"
                    ) from None
            # The controller may have taken note of it; a worker without heartbeats is forgotten.
            await asyncio.sleep(_RECONNECT_S)

    def set_ready(self, epoch: int) -> None:
        """Report from now on that this worker is ready to serve `epoch` (0: none)."""
        self._ready_epoch = epoch
        self._wake.set()

    def report_load(self, take: Callable[[], control_pb2.ExpertLoad]) -> None:
        """Report with each heartbeat from now on what `take`, called in a thread, returns."""
        self._load_report = LoadReport(take)

    async def epochs(
        self, *, timeout_s: float = _RECONNECT_TIMEOUT_S
    ) -> AsyncGenerator[control_pb2.WatchEpochsResponse, None]:
        """Yield the current epoch and then every change of it or of its members' readiness.

        Reconnects when the stream breaks, however it does. Raises UnavailableError after
        `timeout_s` seconds without a stream, and at once for a controller of another cluster.
        """
        loop = asyncio.get_running_loop()
        broken_at = loop.time()
        while True:
            call = self._stub.WatchEpochs(
                control_pb2.WatchEpochsRequest(), metadata=self.metadata, wait_for_ready=True
            )
            try:
                # The first message is sent at once, so that waiting for it is waiting to connect.
                deadline_s = broken_at + timeout_s - loop.time()
                response = await asyncio.wait_for(call.read(), deadline_s)
                reason = "it ended the stream"
                while isinstance(response, control_pb2.WatchEpochsResponse):
                    broken_at = math.inf
                    yield response
                    response = await call.read()
            except TimeoutError:
                raise UnavailableError(
                    f"the controller at {self.address} did not answer within {timeout_s:.0f} s"
                ) from None
            except grpc.aio.AioRpcError as error:
                reason = error.details() or error.code().name
                if error.code() in _IS_ANOTHER:
                    raise UnavailableError(
                        f"the controller at {self.address} refused: {reason}"
                    ) from None
            finally:
                call.cancel()
            broken_at = min(broken_at, loop.time())
            if loop.time() - broken_at >= timeout_s:
                raise UnavailableError(f"the controller at {self.address} failed: {reason}")
            await asyncio.sleep(_RECONNECT_S)
            # Not sooner: where the controller ends as all processes do, this one ends meanwhile.
            logger.warning("following the epochs anew: %s", reason)

    async def leave(self) -> None:
        """End the heartbeats, and tell the controller that this worker was told to stop."""
        if self._heartbeats is None:
            return
        await self._end_heartbeats()
        heartbeat = control_pb2.HeartbeatRequest(
            worker_id=self._registered.worker_id,
            incarnation=self._registered.incarnation,
            leaving=True,
        )
        with contextlib.suppress(grpc.aio.AioRpcError):  # it is gone, or will miss this worker
            await self._stub.Heartbeat(heartbeat, metadata=self.metadata, timeout=_LEAVE_TIMEOUT_S)

    async def close(self) -> None:
        """End the heartbeats and the connection."""
        await self._end_heartbeats()
        await self._channel.close()

    async def _end_heartbeats(self) -> None:
        if self._heartbeats is not None:
            self._heartbeats.cancel()
            await asyncio.wait([self._heartbeats])

    async def _send_heartbeats(self, interval_s: float) -> None:
        loop = asyncio.get_running_loop()
        answered_at, num_failures = loop.time(), 0
        while not self.lost.is_set():
            self._wake.clear()
            heartbeat = await self._heartbeat()
            try:
                response = await self._stub.Heartbeat(
                    heartbeat, metadata=self.metadata, timeout=_ANSWER_INTERVALS * interval_s
                )
                answered_at, num_failures = loop.time(), 0
                if response.left:
                    self._lose(f"{response.left} left the epoch: it was told to stop")
            except grpc.aio.AioRpcError as error:
                num_failures += 1
                silent_s = loop.time() - answered_at
                if error.code() in _IS_ANOTHER:
                    self._lose(
                        f"the controller at {self.address} is not the one that this worker "
                        f"registered with: {error.details()}"
                    )
                elif (
                    silent_s >= LOST_AFTER_INTERVALS * interval_s and num_failures >= _MIN_FAILURES
                ):
                    self._lose(
                        f"the controller at {self.address} has not answered for {silent_s:.1f} s: "
                        f"{error.details()}"
                    )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), interval_s)

    async def _heartbeat(self) -> control_pb2.HeartbeatRequest:
        report = self._load_report
        load = await report.within(_LOAD_DEADLINE_S) if report else None
        return control_pb2.HeartbeatRequest(
            worker_id=self._registered.worker_id,
            incarnation=self._registered.incarnation,
            ready_epoch=self._ready_epoch,
            expert_load=load,
        )

    def _lose(self, loss: str) -> None:
        self.loss = loss
        self.lost.set()

    def _note_end_of_heartbeats(self, heartbeats: asyncio.Task[None]) -> None:
        # Without heartbeats the controller takes this worker for lost: better to end by name.
        if not heartbeats.cancelled() and (error := heartbeats.exception()) is not None:
            logger.error("the heartbeats failed", exc_info=error)
            self._lose(f"this worker cannot send heartbeats any more: {error}")


async def wait_for_epoch(client: ControlClient, *, timeout_s: float) -> control_pb2.Epoch:
    """Return the first epoch.

    Raises UnavailableError when none is formed within `timeout_s`, or one that makes no sense.
    """
    registered: list[control_pb2.Worker] = []
    try:
        async with asyncio.timeout(timeout_s):
            async with contextlib.aclosing(client.epochs(timeout_s=timeout_s)) as responses:
                async for response in responses:
                    if response.HasField("epoch"):
                        check_epoch(response.epoch)
                        return response.epoch
                    registered = list(response.workers)
    except TimeoutError:
        pass
    num_attention = sum(w.role == control_pb2.WORKER_ROLE_ATTENTION for w in registered)
    raise UnavailableError(
        f"no epoch was formed within {timeout_s:.0f} s: only {num_attention} attention and "
        f"{len(registered) - num_attention} expert workers have registered"
    )
