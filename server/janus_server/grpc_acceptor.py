"""A gRPC server that accepts whatever a client calls, and ends calls whose client takes nothing.

grpc.aio has no place of its own for either; what is used of its inside is here, and tests hold it.
"""

import asyncio
import weakref
from collections.abc import Coroutine, Sequence
from typing import Any, NoReturn

import grpc
import grpc.aio
from grpc._cython import cygrpc  # type: ignore[attr-defined]

_UNKNOWN_TIMEOUT_S = 1.0
"""How long a client may take to take the answer that there is no such method."""

_outer_tasks: "weakref.WeakKeyDictionary[asyncio.Task[Any], asyncio.Task[Any]]" = (
    weakref.WeakKeyDictionary()
)
"""Task -> the task that made it."""

_answers: set[asyncio.Task[None]] = set()
"""The event loop itself holds tasks by weak references."""


def new_server(
    options: Sequence[tuple[str, Any]], interceptors: Sequence[grpc.aio.ServerInterceptor]
) -> grpc.aio.Server:
    """A server of which no client can end the loop that accepts calls."""
    server = grpc.aio.server()
    server._loop.set_task_factory(_new_task)  # type: ignore[attr-defined]
    server._server = _CallAcceptor(  # type: ignore[attr-defined]
        server._loop,  # type: ignore[attr-defined]
        None,
        (),
        list(interceptors),
        tuple(options),
        None,
    )
    return server


async def abort(context: Any, code: grpc.StatusCode, sentence: str, *, timeout_s: float) -> None:
    """End a call with a status; where its client has gone, that is all.

    A client that does not take the status within `timeout_s` loses the call without it. gRPC raises
    again after the handler, which has nothing to do after this.
    """
    if not await _send_status(context, code, sentence, timeout_s):
        _reset_call()
        raise asyncio.CancelledError


async def _send_status(
    context: Any, code: grpc.StatusCode, sentence: str, timeout_s: float
) -> bool:
    """Whether the client has gone or took the status in time."""
    try:
        async with asyncio.timeout(timeout_s):
            await context.abort(code, sentence)
    except grpc.aio.BaseError as error:
        error.__traceback__ = None  # the call keeps the error, which must not keep the call
        return True
    except TimeoutError:
        return False
    raise AssertionError("abort raises")


def _reset_call() -> None:
    """End the call that the current task serves, once that has ended.

    Its outer task waits for the client to close the call. After that gRPC lets go of the call, at
    the latest when it accepts the next one, and so resets it.
    """
    task = asyncio.current_task()
    assert task is not None
    outer = _outer_tasks.get(task)
    if outer is not None:
        task.add_done_callback(lambda done: outer.cancel())


def _new_task(
    loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any], **options: Any
) -> asyncio.Task[Any]:
    task: asyncio.Task[Any] = asyncio.Task(coroutine, loop=loop, **options)
    outer = asyncio.current_task(loop)
    if outer is not None:
        _outer_tasks[task] = outer
    return task


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


async def _answer_unknown(call: Any) -> None:
    loop = asyncio.get_running_loop()
    context = cygrpc._ServicerContext(call, None, None, loop)  # pyright: ignore[reportAttributeAccessIssue]
    # Nothing else refers to the call: gRPC resets it when it is let go of here.
    await _send_status(
        context, grpc.StatusCode.UNIMPLEMENTED, "there is no such method", _UNKNOWN_TIMEOUT_S
    )
