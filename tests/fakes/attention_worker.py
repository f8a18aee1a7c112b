"""An attention worker without an engine: the test reads its commands and writes its outputs."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc

from janus_proto.v1 import inference_pb2, worker_pb2
from janus_proto.v1.worker_pb2_grpc import AttentionWorkerServiceServicer

LOAD = worker_pb2.EngineLoad(num_free_blocks=4096, num_blocks=4096, max_context=2**16)


class FakeAttentionWorker(AttentionWorkerServiceServicer):
    """A real AttentionWorkerService whose outputs are scripted."""

    def __init__(self, load: worker_pb2.EngineLoad = LOAD) -> None:
        self.load = load
        self.submits: asyncio.Queue[worker_pb2.SubmitCommand] = asyncio.Queue()
        self.aborts: asyncio.Queue[str] = asyncio.Queue()
        """Ids of AbortCommands."""
        self._outbox: asyncio.Queue[worker_pb2.RunResponse | None] = asyncio.Queue()

    async def Run(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        self._outbox = outbox = asyncio.Queue()
        outbox.put_nowait(worker_pb2.RunResponse(load=self.load))
        reading = asyncio.create_task(self._read(request_iterator))
        try:
            while (response := await outbox.get()) is not None:
                yield response
        finally:
            reading.cancel()
        await context.abort(grpc.StatusCode.INTERNAL, "scripted to break")

    async def GetEngineLoad(self, request: Any, context: Any) -> Any:
        raise AssertionError("not called")

    def put(
        self,
        submit: worker_pb2.SubmitCommand,
        token_ids: Sequence[int] = (),
        finish_reason: int = inference_pb2.FINISH_REASON_UNSPECIFIED,
        logprobs: Sequence[inference_pb2.TokenLogprobs] = (),
        failure: str = "",
    ) -> None:
        """Send new tokens of a request, or why it failed."""
        output = worker_pb2.SequenceOutput(
            request_id=submit.request_id,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=finish_reason,
            failure=failure,
        )
        self._outbox.put_nowait(worker_pb2.RunResponse(outputs=[output], load=self.load))

    def show_life(self) -> None:
        """Say no more than that there is somebody."""
        self._outbox.put_nowait(worker_pb2.RunResponse(load=self.load))

    def break_stream(self) -> None:
        """End the stream to the endpoint with an error."""
        self._outbox.put_nowait(None)

    async def _read(self, requests: AsyncIterator[worker_pb2.RunRequest]) -> None:
        async for request in requests:
            if request.HasField("submit"):
                self.submits.put_nowait(request.submit)
            else:
                self.aborts.put_nowait(request.abort.request_id)
