"""What every call of every server passes on its way to the handler and back.

Invariants: bytes that are no message, and every JanusError that a handler raises, end the call with
a status and one sentence; what is a fault of ours ends it with INTERNAL and a traceback in the log;
no call waits for its client for ever.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from janus_server.byte_budget import Reads
from janus_server.errors import (
    DuplicateRequestError,
    InvalidRequestError,
    JanusError,
    OverloadedError,
    StalledClientError,
    UnavailableError,
)
from janus_server.grpc_acceptor import abort

logger = logging.getLogger(__name__)

_STATUS = {
    InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    DuplicateRequestError: grpc.StatusCode.ALREADY_EXISTS,
    OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    StalledClientError: grpc.StatusCode.ABORTED,
}

_Context = grpc.aio.ServicerContext[Any, Any]
_Error = tuple[grpc.StatusCode, str]
CheckBytes = Callable[[bytes], None]
"""Looks at a request before it is parsed; raises InvalidRequestError."""


class CallGuard(grpc.aio.ServerInterceptor):
    """Reads requests, runs handlers, and turns errors into statuses, for all services alike.

    Handlers are coroutines or, where they stream, asynchronous generators.
    """

    def __init__(
        self,
        check_bytes: CheckBytes,
        *,
        request_timeout_s: float,
        stall_timeout_s: float,
        max_calls_per_method: int,
    ) -> None:
        self.num_stalled = 0
        """Calls that were cut because their client took no message for `stall_timeout_s`."""
        self.reads = Reads()
        self._check_bytes = check_bytes
        self._request_timeout_s = request_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._max_calls_per_method = max_calls_per_method
        self._num_calls: Counter[str] = Counter()
        """Method -> its calls now. Counted apart, so that watchers keep no request out."""

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Wrap the handler of a call."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method

        async def call(requests: AsyncIterator[bytes], context: _Context) -> None:
            error = await self._error_of(method, self._serve(handler, requests, context))
            if error is not None:
                await self._refuse(context, *error)

        # All are registered as streams, and without a deserializer: so requests come here as bytes,
        # and no message of either side is waited for out of sight.
        return grpc.stream_stream_rpc_method_handler(
            call, response_serializer=handler.response_serializer
        )

    @contextlib.contextmanager
    def _counted(self, method: str) -> Iterator[None]:
        if self._num_calls[method] >= self._max_calls_per_method:
            raise OverloadedError(
                f"{self._max_calls_per_method} calls of this method are open; try again later"
            )
        self._num_calls[method] += 1
        try:
            yield
        finally:
            self._num_calls[method] -= 1

    async def _serve(self, handler: Any, requests: AsyncIterator[bytes], context: _Context) -> None:
        if handler.request_streaming:
            request = self._requests(handler, requests, context)
        else:
            request = self._parse(handler, await self._first(context))
        if handler.response_streaming:
            make = handler.stream_stream or handler.unary_stream
            responses = make(request, context)
            del request  # what the handler lets go of is free
            await self._send(responses, context)
        else:
            make = handler.stream_unary or handler.unary_unary
            await self._write(await make(request, context), context, is_first=True)

    async def _send(self, responses: AsyncGenerator[Any, None], context: _Context) -> None:
        is_first = True
        # Closed here rather than by the garbage collector, which may let go of it late.
        async with contextlib.aclosing(responses):
            async for response in responses:
                try:
                    await self._write(response, context, is_first=is_first)
                except StalledClientError as error:
                    # The handler frees what it holds before the client is told.
                    await responses.athrow(error)
                is_first = False

    async def _write(self, response: Any, context: _Context, *, is_first: bool) -> None:
        try:
            async with asyncio.timeout(self._stall_timeout_s):
                # On its own, because a status cannot overtake it in a stalled call.
                if is_first:
                    await context.send_initial_metadata(())
                await context.write(response)
        except TimeoutError:
            self.num_stalled += 1
            raise StalledClientError(
                f"the client took no message for {self._stall_timeout_s:g} s"
            ) from None

    async def _first(self, context: _Context) -> bytes:
        try:
            async with asyncio.timeout(self._request_timeout_s):
                with self.reads.reading(context.peer()):
                    data = await context.read()
        except TimeoutError:
            raise InvalidRequestError(
                f"the request did not arrive within {self._request_timeout_s:g} s"
            ) from None
        if not isinstance(data, bytes):
            raise InvalidRequestError("the call has no request")
        return data

    def _parse(self, handler: Any, data: bytes) -> Any:
        self._check_bytes(data)
        try:
            return handler.request_deserializer(data)
        except DecodeError:
            raise InvalidRequestError(
                "the request is no valid message: damaged, or a text that is not UTF-8"
            ) from None

    async def _requests(
        self, handler: Any, requests: AsyncIterator[bytes], context: _Context
    ) -> AsyncGenerator[Any, None]:
        """The messages of a client's stream; it ends before one that is none, and so the call."""
        while True:
            with self.reads.reading(context.peer()):
                data = await anext(requests, None)
            if data is None:
                return
            request, refusal = None, None
            try:
                request = self._parse(handler, data)
            except InvalidRequestError as error:
                refusal = _error(error)
            if refusal is not None:
                await self._refuse(context, *refusal)
                return
            yield request

    async def _error_of(self, method: str, serving: Coroutine[Any, Any, None]) -> _Error | None:
        """Serve one call, and say what went wrong, if anything.

        Exceptions end here: gRPC would tie them, and the whole request with them, to the call, and
        only the garbage collector would find the knot.
        """
        try:
            with self._counted(method):
                await serving
        except JanusError as error:
            if isinstance(error, StalledClientError):
                logger.warning("cut a call of %s: %s", method, str(error))
            return _error(error)
        except grpc.aio.AbortError as error:  # gRPC raises it again after the handler
            error.__traceback__ = None
        except grpc.aio.BaseError:  # the client has gone while something was sent to it
            raise asyncio.CancelledError from None
        except Exception:
            logger.exception("a call of %s failed", method)
            return grpc.StatusCode.INTERNAL, "an internal error; see the log"
        finally:
            serving.close()
        return None

    async def _refuse(self, context: _Context, code: grpc.StatusCode, sentence: str) -> None:
        await abort(context, code, sentence, timeout_s=self._stall_timeout_s)


def _error(error: JanusError) -> _Error:
    return _STATUS.get(type(error), grpc.StatusCode.INTERNAL), str(error)
