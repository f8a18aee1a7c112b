"""The public InferenceService: admit, tokenize, hand over, stream back."""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import grpc
import grpc.aio

from janus_proto.v1 import inference_pb2
from janus_proto.v1.inference_pb2_grpc import InferenceServiceServicer
from janus_server.endpoint import validation
from janus_server.endpoint.streams import RequestStream, TextAssembler
from janus_server.endpoint.tokenizer import Tokenizer
from janus_server.endpoint.workers import WorkerLink, WorkerPool
from janus_server.errors import (
    DuplicateRequestError,
    InvalidRequestError,
    JanusError,
    OverloadedError,
    UnavailableError,
)
from janus_server.model.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

SERVICE_NAME = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name

_Context = grpc.aio.ServicerContext[Any, Any]


class InferenceService(InferenceServiceServicer):
    """Serves the public API over a pool of attention workers."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer | None,
        pool: WorkerPool,
        *,
        max_context: int,
        max_requests: int,
    ) -> None:
        self._checkpoint = checkpoint
        self._tokenizer = tokenizer
        self._pool = pool
        self._max_context = max_context
        self._max_requests = max_requests
        self._active: dict[str, RequestStream] = {}
        self._draining = False
        self._none_active = asyncio.Event()
        self._none_active.set()

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: _Context
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """Generate from one prompt."""
        with _logged_end() as timeline:
            # Closed here rather than by the garbage collector, which may let go of it late.
            async with contextlib.aclosing(self._generate(request, timeline)) as responses:
                async for response in responses:
                    timeline.note(response)
                    yield response

    async def Abort(
        self, request: inference_pb2.AbortRequest, context: _Context
    ) -> inference_pb2.AbortResponse:
        """End a running request."""
        stream = self._active.get(request.request_id)
        if stream is None:
            await context.abort(
                grpc.StatusCode.NOT_FOUND, "no request with this request_id is running"
            )
        stream.abort()
        return inference_pb2.AbortResponse()

    async def GetModelInfo(
        self, request: inference_pb2.GetModelInfoRequest, context: _Context
    ) -> inference_pb2.GetModelInfoResponse:
        """Describe the model and the pools."""
        spec, epoch = self._checkpoint.spec, self._pool.epoch
        return inference_pb2.GetModelInfoResponse(
            model_name=self._checkpoint.path.name,
            family=spec.family,
            vocab_size=spec.vocab_size,
            max_context=self._bounds().max_context,
            num_layers=spec.num_layers,
            num_moe_layers=len(spec.moe_layers),
            num_experts=spec.num_experts,
            top_k=spec.top_k,
            eos_token_ids=spec.eos_token_ids,
            num_attention_workers=len(epoch.attention_workers),
            num_expert_workers=len(epoch.expert_workers),
            version=version("janus-moe"),
        )

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, give running ones `timeout_s` seconds, fail the rest.

        The failed ones tell their clients while the server stops; it cancels those whose client
        does not listen.
        """
        self._draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._none_active.wait()
        except TimeoutError:
            logger.warning("%d requests outlived the drain", len(self._active))
            for stream in self._active.values():
                stream.fail(UnavailableError("the server shut down before the request was done"))

    def _bounds(self) -> validation.Bounds:
        spec = self._checkpoint.spec
        # The last token of a request is never fed, so it needs no slot.
        room = self._pool.kv_tokens + 1 if self._pool.kv_tokens else self._max_context
        return validation.Bounds(
            vocab_size=spec.vocab_size,
            max_context=min(self._max_context, room),
            eos_token_ids=spec.eos_token_ids,
            has_tokenizer=self._tokenizer is not None,
        )

    def _admit(self, request_id: str) -> RequestStream:
        if self._draining:
            raise UnavailableError("the server is shutting down")
        if not self._pool.is_ready:
            raise UnavailableError("the workers are not ready yet")
        if request_id in self._active:
            raise DuplicateRequestError(f"request_id {request_id} is in use by a running request")
        if len(self._active) >= self._max_requests:
            raise OverloadedError(
                f"{self._max_requests} requests are running or queued already; try again later"
            )
        stream = self._active[request_id] = RequestStream(request_id)
        self._none_active.clear()
        return stream

    async def _generate(
        self, request: inference_pb2.GenerateRequest, timeline: "_Timeline"
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        request_id = request.request_id or secrets.token_hex(8)
        validation.check_request_id(request_id)
        timeline.request_id = request_id
        validation.check_sampling(request.sampling, self._bounds())
        stream = self._admit(request_id)
        link: WorkerLink | None = None
        try:
            prompt_ids = await self._prompt_ids(request)
            sampling = validation.complete_sampling(
                request.sampling,
                num_prompt_tokens=len(prompt_ids),
                bounds=self._bounds(),
                seed=secrets.randbits(63),
            )
            link = self._pool.least_loaded()
            link.submit(stream, prompt_ids, sampling)
            async for response in self._responses(stream, sampling, len(prompt_ids)):
                yield response
        finally:
            del self._active[request_id]
            if link is not None:
                link.abort(stream)
            if not self._active:
                self._none_active.set()

    async def _prompt_ids(self, request: inference_pb2.GenerateRequest) -> list[int]:
        bounds = self._bounds()
        if not request.HasField("prompt"):
            raise InvalidRequestError("the request has no prompt: set text or token_ids")
        prompt_ids: Sequence[int] = request.token_ids.ids
        if request.HasField("text"):
            validation.check_text(request.text, bounds)
            assert self._tokenizer is not None, "check_text refuses text without a tokenizer"
            prompt_ids = await self._tokenizer.encode(
                request.text, lambda length: validation.check_prompt_length(length, bounds)
            )
        validation.check_prompt(prompt_ids, bounds)
        return list(prompt_ids)

    async def _responses(
        self,
        stream: RequestStream,
        sampling: inference_pb2.SamplingParams,
        num_prompt_tokens: int,
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        text = TextAssembler(self._tokenizer.detokenizer() if self._tokenizer else None, sampling)
        num_completion_tokens = 0
        finish_reason = inference_pb2.FINISH_REASON_UNSPECIFIED
        while not finish_reason:
            delta = await stream.take()
            new_text, num_taken = text.add(delta)
            num_completion_tokens += num_taken
            finish_reason = (
                inference_pb2.FINISH_REASON_STOP if text.matched_stop else delta.finish_reason
            )
            response = inference_pb2.GenerateResponse(
                request_id=stream.request_id,
                text=new_text,
                token_ids=delta.token_ids[:num_taken],
                logprobs=delta.logprobs[:num_taken],
                finish_reason=finish_reason,
                matched_stop=text.matched_stop,
            )
            if finish_reason:
                response.usage.prompt_tokens = num_prompt_tokens
                response.usage.completion_tokens = num_completion_tokens
            yield response


class _Timeline:
    """What the log says of a request."""

    def __init__(self) -> None:
        self.request_id = "without a usable id"
        """Until there is one that is known not to garble the log."""
        self._start_s = time.monotonic()
        self._first_s: float | None = None
        self._last = inference_pb2.GenerateResponse()

    @property
    def total_ms(self) -> float:
        return 1e3 * (time.monotonic() - self._start_s)

    def note(self, response: inference_pb2.GenerateResponse) -> None:
        if self._first_s is None:
            self._first_s = time.monotonic()
        self._last = response

    def __str__(self) -> str:
        usage = self._last.usage
        reason = inference_pb2.FinishReason.Name(self._last.finish_reason)
        ttft_s = (self._first_s or time.monotonic()) - self._start_s
        return (
            f"{reason.removeprefix('FINISH_REASON_').lower()}, {usage.prompt_tokens} prompt and "
            f"{usage.completion_tokens} completion tokens, TTFT {1e3 * ttft_s:.0f} ms, "
            f"total {self.total_ms:.0f} ms"
        )


@contextlib.contextmanager
def _logged_end() -> Iterator[_Timeline]:
    """Log one line when the request that runs within has ended, however it did."""
    timeline = _Timeline()
    outcome = "failed"
    try:
        yield timeline
        outcome = str(timeline)
    except JanusError as error:
        outcome = f"failed after {timeline.total_ms:.0f} ms: {error}"
        raise
    except (asyncio.CancelledError, GeneratorExit):
        outcome = f"cancelled after {timeline.total_ms:.0f} ms, by its client or its deadline"
        raise
    finally:
        logger.info("request %s: %s", timeline.request_id, outcome)
