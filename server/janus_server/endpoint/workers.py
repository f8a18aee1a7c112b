"""The attention workers of the epoch, each behind one bidirectional stream."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from janus_proto.v1 import control_pb2, inference_pb2, worker_pb2
from janus_proto.v1.worker_pb2_grpc import AttentionWorkerServiceStub
from janus_server.comm.authentication import Metadata
from janus_server.comm.control_client import ControlClient
from janus_server.endpoint.streams import RequestStream
from janus_server.errors import ConfigError, RequestFailedError, UnavailableError
from janus_server.grpc_server import channel_options

logger = logging.getLogger(__name__)

_RECONNECT_S = 0.5
_CLOSE_TIMEOUT_S = 1.0
"""How long a link that is not wanted any more may take to close, in seconds."""


class WorkerLink:
    """The stream to one attention worker: commands in, the tokens of every step out.

    A worker shows several times within its `comm_timeout_s` that its engine does not hang, however
    long its queue and its steps are. So its silence is what ends the waiting for it.
    """

    def __init__(
        self, worker: control_pb2.Worker, metadata: Metadata, *, comm_timeout_s: float
    ) -> None:
        """`metadata` is what each call to the worker carries."""
        self.worker_id = worker.worker_id
        self.load: worker_pb2.EngineLoad | None = None
        """As of its last message; None while there is no connection."""
        self._address = worker.address
        self._metadata = metadata
        self._comm_timeout_s = comm_timeout_s
        self._was_silent = False
        """Whether the last connection ended because the worker said nothing."""
        self._streams: dict[str, RequestStream] = {}
        self._commands: asyncio.Queue[worker_pb2.RunRequest | None] = asyncio.Queue()
        self._task = asyncio.create_task(self._run(), name=f"link to {self.worker_id}")

    @property
    def num_requests(self) -> int:
        """Requests that this worker has from here."""
        return len(self._streams)

    def submit(
        self,
        stream: RequestStream,
        prompt_ids: list[int],
        sampling: inference_pb2.SamplingParams,
    ) -> None:
        """Hand a request over; its outputs go to `stream`."""
        self._streams[stream.worker_request_id] = stream
        command = worker_pb2.SubmitCommand(
            request_id=stream.worker_request_id, prompt_ids=prompt_ids, sampling=sampling
        )
        self._commands.put_nowait(worker_pb2.RunRequest(submit=command))

    def abort(self, stream: RequestStream) -> None:
        """Tell the worker to drop a request, unless it has ended already."""
        if self._streams.pop(stream.worker_request_id, None) is not None:
            command = worker_pb2.AbortCommand(request_id=stream.worker_request_id)
            self._commands.put_nowait(worker_pb2.RunRequest(abort=command))

    async def close(self) -> None:
        """End the stream; the worker drops what it still has from here."""
        self._task.cancel()
        await asyncio.wait({self._task}, timeout=_CLOSE_TIMEOUT_S)

    async def _run(self) -> None:
        told = ""
        while True:
            lost = f"attention worker {self.worker_id} was lost"
            try:
                async with grpc.aio.insecure_channel(
                    self._address, options=channel_options()
                ) as channel:
                    await self._exchange(channel)
                reason = "it ended the stream"
            except grpc.aio.AioRpcError as error:
                reason = error.details() or error.code().name
            except TimeoutError:
                self._was_silent = True
                reason = f"it said nothing for {self._comm_timeout_s:g} s"
                lost = f"{lost}: {reason}"
            finally:
                was_up, self.load = self.load is not None, None
                for stream in self._streams.values():
                    stream.fail(UnavailableError(lost))
                self._streams.clear()
                # Ends what sends commands: gRPC would let it wait for more after the stream's end.
                self._commands.put_nowait(None)
                # Commands for the lost stream mean nothing to the next one.
                self._commands = asyncio.Queue()
            if was_up or reason != told:  # each new attempt may fail as the last did
                logger.warning("lost attention worker %s: %s", self.worker_id, reason)
                told = reason
            await asyncio.sleep(_RECONNECT_S)

    async def _exchange(self, channel: grpc.aio.Channel) -> None:
        stub = AttentionWorkerServiceStub(channel)
        call = stub.Run(
            self._outgoing(self._commands), metadata=self._metadata, wait_for_ready=True
        )
        while isinstance(response := await self._next(call), worker_pb2.RunResponse):
            if self._was_silent:
                # The first message says that there is a connection, the next that the engine runs.
                self._was_silent = False
                continue
            self.load = response.load
            for output in response.outputs:
                stream = self._streams.get(output.request_id)
                if stream is None:
                    continue  # aborted from here
                if output.finish_reason:
                    del self._streams[output.request_id]
                if output.failure:
                    stream.fail(RequestFailedError(output.failure))
                stream.put(output)

    async def _next(self, call: Any) -> Any:
        async with asyncio.timeout(self._comm_timeout_s):
            return await call.read()

    async def _outgoing(
        self, commands: asyncio.Queue[worker_pb2.RunRequest | None]
    ) -> AsyncIterator[worker_pb2.RunRequest]:
        while (command := await commands.get()) is not None:
            yield command


class WorkerPool:
    """Follows the epochs and keeps one link to each attention worker of the current one."""

    def __init__(
        self, control: ControlClient, *, model_fingerprint: str, comm_timeout_s: float
    ) -> None:
        """A worker that is silent for `comm_timeout_s` seconds counts as lost."""
        self._control = control
        self._model_fingerprint = model_fingerprint
        self._comm_timeout_s = comm_timeout_s
        self._epoch = control_pb2.Epoch()
        self._links: dict[str, WorkerLink] = {}

    @property
    def is_ready(self) -> bool:
        """Whether every worker of the epoch is ready and every link is up."""
        members = (*self._epoch.attention_workers, *self._epoch.expert_workers)
        return (
            bool(members)
            and all(worker.ready for worker in members)
            and all(link.load is not None for link in self._links.values())
        )

    @property
    def epoch(self) -> control_pb2.Epoch:
        """The current epoch; empty before the first."""
        return self._epoch

    @property
    def max_context(self) -> int:
        """Longest prompt plus completion that every worker takes; 0 before any has said."""
        loads = [link.load for link in self._links.values() if link.load is not None]
        return min((load.max_context for load in loads), default=0)

    def least_loaded(self) -> WorkerLink:
        """The link with the fewest requests; raises UnavailableError where there is none."""
        links = [link for link in self._links.values() if link.load is not None]
        if not links:
            raise UnavailableError("no attention worker is ready")
        return min(links, key=lambda link: link.num_requests)

    async def follow(self) -> None:
        """Keep the links as the epochs say, until cancelled; then end them all.

        Raises ConfigError where the workers serve another model than this endpoint, or have another
        --comm-timeout-s.
        """
        try:
            async with contextlib.aclosing(self._control.epochs()) as responses:
                async for response in responses:
                    if response.model_fingerprint != self._model_fingerprint:
                        raise ConfigError(
                            "this endpoint serves another model than the controller's workers: "
                            "their configurations or weights differ"
                        )
                    if response.comm_timeout_s != self._comm_timeout_s:
                        raise ConfigError(
                            f"this endpoint has --comm-timeout-s {self._comm_timeout_s}, the "
                            f"controller and its workers {response.comm_timeout_s}: all processes "
                            "of a cluster need the same"
                        )
                    await self._adopt(response.epoch)
        finally:
            await self._adopt(control_pb2.Epoch())

    async def _adopt(self, epoch: control_pb2.Epoch) -> None:
        self._epoch = epoch
        workers = {worker.worker_id: worker for worker in epoch.attention_workers if worker.ready}
        gone = self._links.keys() - workers.keys()
        await asyncio.gather(*(self._links.pop(worker_id).close() for worker_id in gone))
        for worker_id in workers.keys() - self._links.keys():
            self._links[worker_id] = WorkerLink(
                workers[worker_id], self._control.metadata, comm_timeout_s=self._comm_timeout_s
            )
