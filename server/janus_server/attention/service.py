"""AttentionWorkerService: the engine thread behind a bidirectional gRPC stream."""

import asyncio
import logging
from collections.abc import AsyncIterator

import grpc
import grpc.aio

from janus_proto.v1 import inference_pb2, worker_pb2
from janus_proto.v1.worker_pb2_grpc import AttentionWorkerServiceServicer
from janus_scheduler.request import FinishReason, SamplingParams
from janus_server.attention.engine import TokenOutput
from janus_server.attention.engine_thread import EngineThread, StepResult

logger = logging.getLogger(__name__)

_FINISH_REASONS = {
    None: inference_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: inference_pb2.FINISH_REASON_ABORT,
}

_MAX_ID_CHARS = 256
"""Of a request's id at the worker: the client's, which is shorter, and what makes it unique."""

MAX_BEHIND = 8192
"""Messages that the reader of a stream may be behind; some megabytes of memory."""

_Outbox = asyncio.Queue[worker_pb2.RunResponse | None]
"""None: the stream ends."""


class AttentionWorkerService(AttentionWorkerServiceServicer):
    """Hands commands to the engine and every step's tokens to the streams they belong to."""

    def __init__(self) -> None:
        self.engine: EngineThread | None = None
        """Set once the epoch's engine runs; commands before that are refused as UNAVAILABLE."""
        self._outboxes: set[_Outbox] = set()
        """Of each stream."""
        self._outbox_of: dict[str, _Outbox] = {}
        """Request id -> the outbox of the stream that it came over."""

    def publish(self, result: StepResult) -> None:
        """Send one step's outputs out; call it on the event loop."""
        messages: dict[_Outbox, worker_pb2.RunResponse] = {}
        for output in [
            *map(_sequence_output, result.outputs),
            *(_ended_output(request_id) for request_id in result.aborted),
            *(_ended_output(failed.request_id, failed.reason) for failed in result.failures),
        ]:
            outbox = self._outbox_of.get(output.request_id)
            if outbox is None:
                continue  # its stream is gone, and its abort is on the way
            if output.finish_reason:
                del self._outbox_of[output.request_id]
            message = messages.setdefault(
                outbox, worker_pb2.RunResponse(step=result.step, load=result.load)
            )
            message.outputs.append(output)
        for outbox, message in messages.items():
            self._put(outbox, message)
        self._show_life(worker_pb2.RunResponse(step=result.step, load=result.load))

    async def watch(self, engine: EngineThread, interval_s: float) -> None:
        """Show on every stream, once an interval, that the engine does not hang; until cancelled.

        Where it hangs the streams fall silent, so that the endpoint can give up waiting.
        """
        progress = -1
        while True:
            await asyncio.sleep(interval_s)
            if engine.progress != progress:
                progress = engine.progress
                self._show_life(worker_pb2.RunResponse(load=engine.load()))

    def close(self) -> None:
        """End all streams, so that the server has none to cut off when it stops."""
        for outbox in self._outboxes:
            outbox.put_nowait(None)

    def _put(self, outbox: _Outbox, message: worker_pb2.RunResponse) -> None:
        if outbox.qsize() < MAX_BEHIND:
            outbox.put_nowait(message)
            return
        logger.warning("ended a stream whose reader is %d messages behind", MAX_BEHIND)
        self._forget(outbox)
        while not outbox.empty():
            outbox.get_nowait()
        outbox.put_nowait(None)

    def _forget(self, outbox: _Outbox) -> None:
        """Drop what came over a stream and has not ended."""
        self._outboxes.discard(outbox)
        for request_id in [name for name, box in self._outbox_of.items() if box is outbox]:
            del self._outbox_of[request_id]
            if self.engine is not None:
                self.engine.abort(request_id)

    def _show_life(self, message: worker_pb2.RunResponse) -> None:
        for outbox in self._outboxes:
            if outbox.empty():  # what is in it shows as much, once it is read
                outbox.put_nowait(message)

    async def Run(
        self,
        request_iterator: AsyncIterator[worker_pb2.RunRequest],
        context: grpc.aio.ServicerContext[worker_pb2.RunRequest, worker_pb2.RunResponse],
    ) -> AsyncIterator[worker_pb2.RunResponse]:
        """Serve one stream; what it submitted and did not finish is dropped when it ends."""
        engine = await self._engine(context)
        outbox: _Outbox = asyncio.Queue()
        outbox.put_nowait(worker_pb2.RunResponse(load=engine.load()))
        self._outboxes.add(outbox)
        commands = asyncio.create_task(self._take_commands(engine, request_iterator, outbox))
        commands.add_done_callback(lambda _: outbox.put_nowait(None))
        try:
            while (response := await outbox.get()) is not None:
                yield response
        finally:
            commands.cancel()
            self._forget(outbox)

    async def GetEngineLoad(
        self,
        request: worker_pb2.GetEngineLoadRequest,
        context: grpc.aio.ServicerContext[
            worker_pb2.GetEngineLoadRequest, worker_pb2.GetEngineLoadResponse
        ],
    ) -> worker_pb2.GetEngineLoadResponse:
        """Report what the engine holds."""
        engine = await self._engine(context)
        return worker_pb2.GetEngineLoadResponse(load=engine.load())

    async def _engine(self, context: grpc.aio.ServicerContext) -> EngineThread:  # type: ignore[type-arg]
        if self.engine is None:
            await context.abort(
                grpc.StatusCode.UNAVAILABLE, "this attention worker is not in an epoch yet"
            )
        return self.engine

    async def _take_commands(
        self,
        engine: EngineThread,
        requests: AsyncIterator[worker_pb2.RunRequest],
        outbox: _Outbox,
    ) -> None:
        async for request in requests:
            if outbox not in self._outboxes:
                return  # the stream was ended from here
            if request.HasField("submit"):
                self._submit(engine, request.submit, outbox)
            elif self._outbox_of.get(request.abort.request_id) is outbox:
                engine.abort(request.abort.request_id)

    def _submit(
        self, engine: EngineThread, submit: worker_pb2.SubmitCommand, outbox: _Outbox
    ) -> None:
        try:
            self._check_id(submit.request_id)
            params = _params(submit.sampling)
        except ValueError as error:
            logger.error("refused a request: %s", error)
            ended = _ended_output(submit.request_id, str(error))
            self._put(outbox, worker_pb2.RunResponse(outputs=[ended], load=engine.load()))
            return
        self._outbox_of[submit.request_id] = outbox
        engine.submit(submit.request_id, tuple(submit.prompt_ids), params)

    def _check_id(self, request_id: str) -> None:
        if not 1 <= len(request_id) <= _MAX_ID_CHARS or not request_id.isprintable():
            raise ValueError(f"its id at the worker is {request_id[:_MAX_ID_CHARS]!a}")
        if request_id in self._outbox_of:
            raise ValueError(f"its id at the worker, {request_id}, is in use")


def _params(sampling: inference_pb2.SamplingParams) -> SamplingParams:
    return SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=sampling.seed,
        max_tokens=sampling.max_tokens,
        stop_token_ids=frozenset(sampling.stop_token_ids),
        num_logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
    )


def _sequence_output(output: TokenOutput) -> worker_pb2.SequenceOutput:
    message = worker_pb2.SequenceOutput(
        request_id=output.request_id,
        token_ids=[output.token_id],
        finish_reason=_FINISH_REASONS[output.finish_reason],
    )
    if output.logprobs is not None:
        message.logprobs.add(
            logprob=output.logprobs.chosen,
            top_ids=output.logprobs.top_ids,
            top_logprobs=output.logprobs.top,
        )
    return message


def _ended_output(request_id: str, failure: str = "") -> worker_pb2.SequenceOutput:
    return worker_pb2.SequenceOutput(
        request_id=request_id,
        finish_reason=_FINISH_REASONS[FinishReason.ABORT],
        failure=failure,
    )
