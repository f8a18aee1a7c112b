"""The endpoint's side of one running request: what has come in and was not yet taken out."""

import asyncio
import secrets
from dataclasses import dataclass, field

from janus_proto.v1 import inference_pb2, worker_pb2
from janus_server.endpoint.stop_strings import StopMatcher
from janus_server.endpoint.tokenizer import Detokenizer
from janus_server.errors import JanusError, StalledClientError

MAX_PENDING_TOKENS = 8192
"""Tokens that a client may be behind; with log-probabilities, some megabytes of memory."""
MAX_DELTA_TOKENS = 256
"""Tokens of one message: it stays small, and making it keeps no other stream waiting."""


@dataclass(kw_only=True, slots=True)
class Delta:
    """New tokens of a request since the last delta."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[inference_pb2.TokenLogprobs] = field(default_factory=list)
    finish_reason: "inference_pb2.FinishReason.ValueType" = inference_pb2.FINISH_REASON_UNSPECIFIED


class RequestStream:
    """Merges outputs until they are taken, which a slow client may put off for a while."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.worker_request_id = f"{request_id}#{secrets.token_hex(4)}"
        """Its id at the worker, which may still be ending the last request of the same id."""
        self._pending = Delta()
        self._error: JanusError | None = None
        self._changed = asyncio.Event()

    @property
    def is_over(self) -> bool:
        """Whether nothing follows what is pending."""
        return bool(self._pending.finish_reason) or self._error is not None

    def put(self, output: worker_pb2.SequenceOutput) -> None:
        """Take in what a step brought; ignored once the request is over."""
        if self.is_over:
            return
        self._pending.token_ids += output.token_ids
        for logprobs in output.logprobs:
            # A part of a message would keep the whole step's message in memory.
            copy = inference_pb2.TokenLogprobs()
            copy.CopyFrom(logprobs)
            self._pending.logprobs.append(copy)
        self._pending.finish_reason = output.finish_reason
        self._changed.set()
        if len(self._pending.token_ids) > MAX_PENDING_TOKENS:
            self._pending = Delta()
            self.fail(StalledClientError(f"the client is {MAX_PENDING_TOKENS} tokens behind"))

    def fail(self, error: JanusError) -> None:
        """Let the next `take` raise."""
        if not self.is_over:
            self._error = error
            self._changed.set()

    def abort(self) -> None:
        """End the request with what has come so far."""
        if not self.is_over:
            self._pending.finish_reason = inference_pb2.FINISH_REASON_ABORT
            self._changed.set()

    async def take(self) -> Delta:
        """Wait for something new and take it, MAX_DELTA_TOKENS at most.

        Raises what `fail` was given.

        Its deadline is that of the worker's link, which fails the streams of a worker that is lost
        or silent: the queue of a worker that works may be long.
        """
        await self._changed.wait()
        if self._error is not None:
            raise self._error
        pending = self._pending
        if len(pending.token_ids) > MAX_DELTA_TOKENS:
            self._pending = Delta(
                token_ids=pending.token_ids[MAX_DELTA_TOKENS:],
                logprobs=pending.logprobs[MAX_DELTA_TOKENS:],
                finish_reason=pending.finish_reason,
            )
            return Delta(
                token_ids=pending.token_ids[:MAX_DELTA_TOKENS],
                logprobs=pending.logprobs[:MAX_DELTA_TOKENS],
            )
        self._changed.clear()
        self._pending = Delta()
        return pending


class TextAssembler:
    """Turns deltas into text: whole characters, cut before stop strings and end tokens."""

    def __init__(
        self, detokenizer: Detokenizer | None, sampling: inference_pb2.SamplingParams
    ) -> None:
        self._detokenizer = detokenizer
        self._stop_token_ids = frozenset(sampling.stop_token_ids)
        self._matcher = StopMatcher(sampling.stop)

    @property
    def matched_stop(self) -> str:
        """The stop string that ended the text; "" if none has."""
        return self._matcher.matched

    def add(self, delta: Delta) -> tuple[str, int]:
        """The text that a delta completes, and how many of its tokens it took.

        Fewer than all where a stop string was found: the tokens behind it do not count.
        """
        if self._detokenizer is None:
            return "", len(delta.token_ids)
        shown = ""
        for index, token_id in enumerate(delta.token_ids):
            is_last = bool(delta.finish_reason) and index + 1 == len(delta.token_ids)
            if is_last and token_id in self._stop_token_ids:
                break
            shown += self._matcher.feed(self._detokenizer.feed([token_id]))
            if self._matcher.matched:
                return shown, index + 1
        if delta.finish_reason:
            shown += self._matcher.feed(self._detokenizer.finish())
            if not self._matcher.matched:
                shown += self._matcher.finish()
        return shown, len(delta.token_ids)
