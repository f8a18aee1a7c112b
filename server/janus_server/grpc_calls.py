"""What every call of every server passes on its way to the handler and back.

Invariants: bytes that are no message, and every JanusError that a handler raises, end the call with
a status and one sentence; what is a fault of ours ends it with INTERNAL and a traceback in the log;
no call waits for its client for ever.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from janus_server.errors import (
    DuplicateRequestError,
    InvalidRequestError,
    JanusError,
    OverloadedError,
    StalledClientError,
    UnavailableError,
)

logger = logging.getLogger(__name__)

REQUEST_TIMEOUT_S = 30.0
"""How long a call that was begun may take to bring its whole request, in seconds."""

_UNKNOWN_TIMEOUT_S = 1.0
"""How long a client may take to take the answer that there is no such method."""

_STATUS = {
    InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    DuplicateRequestError: grpc.StatusCode.ALREADY_EXISTS,
    OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    StalledClientError: grpc.StatusCode.ABORTED,
}

_Context = grpc.aio.ServicerContext[Any, Any]
CheckBytes = Callable[[bytes], None]
"""Looks at a request before it is parsed; raises InvalidRequestError."""


def new_server(
    options: Sequence[tuple[str, Any]], interceptors: Sequence[grpc.aio.ServerInterceptor]
) -> grpc.aio.Server:
    """A server of which no client can end the loop that accepts calls."""
    server = grpc.aio.server()
    # grpc.aio has no place of its own for this; tests hold what is used of its inside.
    server._server = _CallAcceptor(  # type: ignore[attr-defined]
        server._loop,  # type: ignore[attr-defined]
        None,
        (),
        list(interceptors),
        tuple(options),
        None,
    )
    return server


class _CallAcceptor(cygrpc.AioServer):  # type: ignore[misc]
    """Answers calls of unknown methods by itself.

    The loop of grpc.aio would look into them, and end, with the whole server, at a path that is not
    UTF-8. Calls of known methods are told apart by gRPC's core, which takes a path for bytes.
    """

    async def _request_call(self) -> NoReturn:
        while True:
            call = await super()._request_call()
            answer = asyncio.create_task(_answer_unknown(call), name="unknown method")
            _answers.add(answer)
            answer.add_done_callback(_answers.discard)


_answers: set[asyncio.Task[None]] = set()
"""The event loop itself holds tasks by weak references."""


async def _answer_unknown(call: Any) -> None:
    loop = asyncio.get_running_loop()
    context = cygrpc._ServicerContext(call, None, None, loop)  # pyright: ignore[reportAttributeAccessIssue]
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_UNKNOWN_TIMEOUT_S):
            await _abort(context, grpc.StatusCode.UNIMPLEMENTED, "there is no such method")


class CallGuard(grpc.aio.ServerInterceptor):
    """Reads requests, runs handlers, and turns errors into statuses, for all services alike.

    Handlers are coroutines or, where they stream, asynchronous generators.
    """

    def __init__(
        self, check_bytes: CheckBytes, *, stall_timeout_s: float, max_calls_per_method: int
    ) -> None:
        self.num_stalled = 0
        """Calls that were cut because their client took no message for `stall_timeout_s`."""
        self._check_bytes = check_bytes
        self._stall_timeout_s = stall_timeout_s
        self._max_calls_per_method = max_calls_per_method
        self._num_calls: Counter[str] = Counter()
        """Method -> its calls now. Counted apart, so that watchers keep no request out."""

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Wrap the handler of a call."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        # All are registered as reading a stream: then the request is bytes that are read here.
        if not handler.response_streaming:
            assert not handler.request_streaming, "no service has such a method"
            return grpc.stream_unary_rpc_method_handler(
                self._unary(method, handler), response_serializer=handler.response_serializer
            )
        return grpc.stream_stream_rpc_method_handler(
            self._stream(method, handler), response_serializer=handler.response_serializer
        )

    def _unary(self, method: str, handler: Any) -> Any:
        async def call(requests: Any, context: _Context) -> Any:
            async with _errors_as_statuses(method, context), self._counted(method):
                request = self._parse(handler, await _first(context))
                return await handler.unary_unary(request, context)

        return call

    def _stream(self, method: str, handler: Any) -> Any:
        async def call(requests: AsyncIterator[bytes], context: _Context) -> None:
            async with _errors_as_statuses(method, context), self._counted(method):
                if handler.request_streaming:
                    responses = handler.stream_stream(
                        self._requests(handler, requests, context), context
                    )
                else:
                    request = self._parse(handler, await _first(context))
                    responses = handler.unary_stream(request, context)
                # Closed here rather than by the garbage collector, which may let go of it late.
                async with contextlib.aclosing(responses):
                    await self._send(responses, method, context)

        return call

    async def _send(
        self, responses: AsyncGenerator[Any, None], method: str, context: _Context
    ) -> None:
        is_first = True
        async for response in responses:
            try:
                async with asyncio.timeout(self._stall_timeout_s):
                    # On its own, because a status cannot overtake it in a stalled call.
                    if is_first:
                        await context.send_initial_metadata(())
                    await context.write(response)
            except TimeoutError:
                self.num_stalled += 1
                error = StalledClientError(
                    f"the client took no message for {self._stall_timeout_s:g} s"
                )
                logger.warning("cut a call of %s: %s", method, error)
                # The handler frees what it holds before the client is told, who may never listen.
                await responses.athrow(error)
            is_first = False

    @contextlib.asynccontextmanager
    async def _counted(self, method: str) -> AsyncIterator[None]:
        if self._num_calls[method] >= self._max_calls_per_method:
            raise OverloadedError(
                f"{self._max_calls_per_method} calls of this method are open; try again later"
            )
        self._num_calls[method] += 1
        try:
            yield
        finally:
            self._num_calls[method] -= 1

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
        async for data in requests:
            try:
                request = self._parse(handler, data)
            except InvalidRequestError as error:
                await _refuse(context, error)
                return
            yield request


async def _first(context: _Context) -> bytes:
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            data = await context.read()
    except TimeoutError:
        raise InvalidRequestError(
            f"the request did not arrive within {REQUEST_TIMEOUT_S:g} s"
        ) from None
    if not isinstance(data, bytes):
        raise InvalidRequestError("the call has no request")
    return data


@contextlib.asynccontextmanager
async def _errors_as_statuses(method: str, context: _Context) -> AsyncIterator[None]:
    try:
        yield
    except JanusError as error:
        await _refuse(context, error)
    except grpc.aio.AbortError:
        raise
    except grpc.aio.BaseError:  # the client has gone while something was sent to it
        raise asyncio.CancelledError from None
    except Exception:
        logger.exception("a call of %s failed", method)
        await _abort(context, grpc.StatusCode.INTERNAL, "an internal error; see the log")


async def _refuse(context: _Context, error: JanusError) -> None:
    await _abort(context, _STATUS.get(type(error), grpc.StatusCode.INTERNAL), str(error))


async def _abort(context: _Context, code: grpc.StatusCode, sentence: str) -> None:
    """End the call; where its client is gone, that is all. gRPC raises again after the handler."""
    with contextlib.suppress(grpc.aio.BaseError):
        await context.abort(code, sentence)
