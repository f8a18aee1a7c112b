"""Requests from admission to their last token; knows no protocol."""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

from janus_proto.v1 import inference_pb2
from janus_scheduler.model_spec import ModelSpec
from janus_server.endpoint import validation
from janus_server.endpoint.streams import RequestStream, TextAssembler
from janus_server.endpoint.timeline import Timeline, logged_end
from janus_server.endpoint.tokenizer import Tokenizer
from janus_server.endpoint.workers import WorkerLink, WorkerPool
from janus_server.errors import (
    DuplicateRequestError,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
)

logger = logging.getLogger(__name__)


class Generation:
    """Admits, tokenizes, hands over to a worker, streams back, cancels, drains."""

    def __init__(
        self,
        spec: ModelSpec,
        tokenizer: Tokenizer | None,
        pool: WorkerPool,
        *,
        max_context: int,
        max_requests: int,
    ) -> None:
        self._spec = spec
        self._tokenizer = tokenizer
        self._pool = pool
        self._max_context = max_context
        self._max_requests = max_requests
        self._active: dict[str, RequestStream] = {}
        self._draining = False
        self._none_active = asyncio.Event()
        self._none_active.set()

    async def generate(
        self, request: inference_pb2.GenerateRequest
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """Serve one request; raises a JanusError where it cannot. Closing this cancels it."""
        with logged_end() as timeline:
            # Closed here rather than by the garbage collector, which may let go of it late.
            async with contextlib.aclosing(self._generate(request, timeline)) as responses:
                del request  # nothing needs the prompt while its completion is made
                async for response in responses:
                    timeline.note(response)
                    yield response

    def abort(self, request_id: str) -> bool:
        """End a running request with what has come so far; false where there is none of this id."""
        stream = self._active.get(request_id)
        if stream is not None:
            stream.abort()
        return stream is not None

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

    def bounds(self) -> validation.Bounds:
        """What bounds a request now."""
        return validation.Bounds(
            vocab_size=self._spec.vocab_size,
            max_context=min(self._max_context, self._pool.max_context or self._max_context),
            eos_token_ids=self._spec.eos_token_ids,
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
        self, request: inference_pb2.GenerateRequest, timeline: Timeline
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        request_id = request.request_id or secrets.token_hex(8)
        validation.check_request_id(request_id)
        timeline.request_id = request_id
        validation.check_sampling(request.sampling, self.bounds())
        stream = self._admit(request_id)
        link: WorkerLink | None = None
        try:
            prompt_ids = await self._prompt_ids(request)
            sampling = validation.complete_sampling(
                request.sampling,
                num_prompt_tokens=len(prompt_ids),
                bounds=self.bounds(),
                seed=secrets.randbits(63),
            )
            link = self._pool.least_loaded()
            link.submit(stream, prompt_ids, sampling)
            num_prompt_tokens = len(prompt_ids)
            del request, prompt_ids
            async for response in self._responses(stream, sampling, num_prompt_tokens):
                yield response
        finally:
            del self._active[request_id]
            if link is not None:
                link.abort(stream)
            if not self._active:
                self._none_active.set()

    async def _prompt_ids(self, request: inference_pb2.GenerateRequest) -> list[int]:
        bounds = self.bounds()
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
