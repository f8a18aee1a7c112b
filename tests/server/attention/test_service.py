"""The worker's stream, as the endpoint sees it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from janus_proto.v1 import inference_pb2, worker_pb2
from janus_proto.v1.worker_pb2_grpc import (
    AttentionWorkerServiceStub,
    add_AttentionWorkerServiceServicer_to_server,
)
from janus_server.attention.engine import TokenOutput
from janus_server.attention.engine_thread import EngineThread, StepResult
from janus_server.attention.service import MAX_BEHIND, AttentionWorkerService
from janus_server.comm.work_thread import WorkThread
from janus_server.grpc_server import start_server
from tests.conftest import CheckpointFactory
from tests.fakes.decoding import local_pool
from tests.fakes.engines import POISONED_TOKEN, make_engine, poisoned_weights

DEADLINE_S = 20
KEEPALIVE_S = 0.05
ABORTED = inference_pb2.FINISH_REASON_ABORT
LENGTH = inference_pb2.FINISH_REASON_LENGTH


@pytest.fixture(scope="module")
def folder(make_checkpoint: CheckpointFactory) -> Path:
    return make_checkpoint()


@contextlib.asynccontextmanager
async def running_service(folder: Path) -> AsyncIterator[AttentionWorkerServiceStub]:
    """A service whose engine cannot compute POISONED_TOKEN; it closes in order."""
    service = AttentionWorkerService()
    server = await start_server(
        lambda grpc_server: add_AttentionWorkerServiceServicer_to_server(service, grpc_server),
        [],
        "127.0.0.1:0",
    )
    loop = asyncio.get_running_loop()
    steps = EngineThread(
        make_engine(folder, poisoned_weights(folder)),
        local_pool(folder, 2),
        publish=lambda result: loop.call_soon_threadsafe(service.publish, result) and None,
        keepalive_s=KEEPALIVE_S,
    )
    thread = WorkThread(steps.run, name="steps")
    watching = asyncio.create_task(service.watch(steps, KEEPALIVE_S))
    service.engine = steps
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield AttentionWorkerServiceStub(channel)
    finally:
        watching.cancel()
        steps.stop()
        await thread.result()
        await server.stop(0)


def submit(request_id: str, *prompt_ids: int, max_tokens: int = 2) -> worker_pb2.RunRequest:
    sampling = inference_pb2.SamplingParams(temperature=0.0, top_p=1.0, max_tokens=max_tokens)
    return worker_pb2.RunRequest(
        submit=worker_pb2.SubmitCommand(
            request_id=request_id, prompt_ids=prompt_ids, sampling=sampling
        )
    )


def test_each_request_ends_with_its_own_outcome(folder: Path) -> None:
    async def check() -> None:
        async with running_service(folder) as stub:
            call = stub.Run()
            await call.write(submit("sound", 5, 6))
            await call.write(submit("poisoned", 5, POISONED_TOKEN))
            await call.write(submit("too long", 5, max_tokens=5000))
            ends: dict[str, worker_pb2.SequenceOutput] = {}
            while len(ends) < 3:
                response = await call.read()
                assert response.load.num_blocks > 0
                ends |= {out.request_id: out for out in response.outputs if out.finish_reason}
            assert (ends["sound"].finish_reason, ends["sound"].failure) == (LENGTH, "")
            assert (ends["poisoned"].finish_reason, ends["poisoned"].failure) == (
                ABORTED,
                "the model computed logits that are not finite",
            )
            assert "needs room for 5001 tokens" in ends["too long"].failure
            call.cancel()

    asyncio.run(asyncio.wait_for(check(), DEADLINE_S))


BROKEN_SUBMITS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "has no prompt": ({"prompt_ids": []}, {}),
    "has the token id 256; the vocabulary ends at 255": ({"prompt_ids": [1, 256, 2]}, {}),
    "has the token id 2147483648": ({"prompt_ids": [2**31]}, {}),
    "has the token id 4294967295": ({"prompt_ids": [2**32 - 1]}, {}),
    "its id at the worker is ''": ({"request_id": ""}, {}),
    "its id at the worker is 'a\\nb'": ({"request_id": "a\nb"}, {}),
    "its id at the worker is 'xxx": ({"request_id": "x" * 257}, {}),
    "temperature is nan": ({}, {"temperature": float("nan")}),
    "temperature is -1;": ({}, {"temperature": -1.0}),
    "temperature is inf": ({}, {"temperature": float("inf")}),
    "top_k is -1": ({}, {"top_k": -1}),
    "top_p is nan": ({}, {"top_p": float("nan")}),
    "top_p is 0, which leaves no token": ({}, {"top_p": 0.0}),
    "top_p is 1.5": ({}, {"top_p": 1.5}),
    "min_p is 2;": ({}, {"min_p": 2.0}),
    "seed is -1": ({}, {"seed": -1}),
    "logprobs is 21": ({}, {"logprobs": 21}),
    "logprobs is -1": ({}, {"logprobs": -1}),
    "max_tokens is 0": ({}, {"max_tokens": 0}),
    "needs room for 2147483649 tokens": ({}, {"max_tokens": 2**31 - 1}),
    "needs room for 5001 tokens": ({"prompt_ids": [1] * 4999}, {}),
}


def test_what_no_endpoint_may_submit_ends_alone_and_says_why(folder: Path) -> None:
    async def check() -> None:
        async with running_service(folder) as stub:
            call = stub.Run()
            await call.read()
            for sentence, (fields, sampling) in BROKEN_SUBMITS.items():
                broken = worker_pb2.RunRequest(
                    submit=worker_pb2.SubmitCommand(
                        **{"request_id": "broken", "prompt_ids": [5, 6], **fields},
                        sampling=inference_pb2.SamplingParams(
                            **{"top_p": 1.0, "max_tokens": 2, **sampling}
                        ),
                    )
                )
                [end] = (await written(call, broken)).outputs
                assert (end.request_id, end.finish_reason) == (broken.submit.request_id, ABORTED)
                assert sentence in end.failure
            await call.write(submit("sound", 5, 6))
            assert await last_reason(call) == LENGTH
            call.cancel()

    asyncio.run(asyncio.wait_for(check(), DEADLINE_S))


async def written(call: Any, request: worker_pb2.RunRequest) -> worker_pb2.RunResponse:
    """The first answer with outputs."""
    await call.write(request)
    while not (response := await call.read()).outputs:
        pass
    return response


async def last_reason(call: Any) -> int:
    while True:
        for output in (await call.read()).outputs:
            if output.finish_reason:
                return output.finish_reason


def test_a_stream_ends_no_request_of_another(folder: Path) -> None:
    async def check() -> None:
        async with running_service(folder) as stub:
            call, other = stub.Run(), stub.Run()
            await call.write(submit("mine", 5, 6, max_tokens=40))
            await call.read()
            abort = worker_pb2.AbortCommand(request_id="mine")
            await other.write(worker_pb2.RunRequest(abort=abort))
            # Taken after the abort.
            [refused] = (await written(other, submit("mine", 5))).outputs
            assert (refused.finish_reason, refused.failure) == (
                ABORTED,
                "its id at the worker, mine, is in use",
            )
            assert await last_reason(call) == LENGTH
            call.cancel()
            other.cancel()

    asyncio.run(asyncio.wait_for(check(), DEADLINE_S))


def test_an_idle_worker_shows_life(folder: Path) -> None:
    async def check() -> None:
        async with running_service(folder) as stub:
            call = stub.Run()
            for _ in range(4):
                assert (await call.read()).load.num_blocks > 0
            call.cancel()

    asyncio.run(asyncio.wait_for(check(), DEADLINE_S))


class IdleEngine:
    progress = 7

    def __init__(self) -> None:
        self.requests: set[str] = set()

    def submit(self, request_id: str, *_: object) -> None:
        self.requests.add(request_id)

    def abort(self, request_id: str) -> None:
        self.requests.remove(request_id)

    def load(self) -> worker_pb2.EngineLoad:
        return worker_pb2.EngineLoad(num_blocks=3)


@contextlib.asynccontextmanager
async def idle_service() -> AsyncIterator[
    tuple[AttentionWorkerService, AttentionWorkerServiceStub]
]:
    service = AttentionWorkerService()
    service.engine = IdleEngine()  # type: ignore[assignment]
    server = await start_server(
        lambda grpc_server: add_AttentionWorkerServiceServicer_to_server(service, grpc_server),
        [],
        "127.0.0.1:0",
    )
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield service, AttentionWorkerServiceStub(channel)
    finally:
        await server.stop(0)


def test_close_ends_the_streams_in_order() -> None:
    async def check() -> None:
        async with idle_service() as (service, stub):
            call = stub.Run()
            assert (await call.read()).load.num_blocks == 3
            service.close()
            assert await call.read() == grpc.aio.EOF
            assert await call.code() == grpc.StatusCode.OK

    asyncio.run(asyncio.wait_for(check(), DEADLINE_S))


def test_a_stream_that_is_cut_off_leaves_no_task() -> None:
    async def check() -> None:
        async with idle_service() as (service, stub):
            call = stub.Run()
            await call.read()
            call.cancel()
            while service._outboxes:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            assert [task for task in asyncio.all_tasks() if "Queue.get" in repr(task)] == []

    asyncio.run(asyncio.wait_for(check(), DEADLINE_S))


def test_a_worker_that_hangs_falls_silent() -> None:
    async def check() -> None:
        service = AttentionWorkerService()
        outbox: asyncio.Queue[worker_pb2.RunResponse] = asyncio.Queue()
        service._outboxes.add(outbox)
        engine = IdleEngine()
        watching = asyncio.create_task(service.watch(engine, 0.01))  # type: ignore[arg-type]
        await outbox.get()
        await asyncio.sleep(0.1)
        assert outbox.empty()
        engine.progress = 8
        await outbox.get()
        watching.cancel()

    asyncio.run(asyncio.wait_for(check(), DEADLINE_S))


def test_a_stream_whose_reader_is_far_behind_ends_and_drops_its_requests() -> None:
    async def requests() -> AsyncIterator[worker_pb2.RunRequest]:
        yield submit("mine", 5, 6)
        await asyncio.Event().wait()

    async def check() -> None:
        service, engine = AttentionWorkerService(), IdleEngine()
        service.engine = engine  # type: ignore[assignment]
        stream = service.Run(requests(), None)  # type: ignore[arg-type]
        await anext(stream)
        while not engine.requests:
            await asyncio.sleep(0)
        output = TokenOutput(request_id="mine", token_id=7, logprobs=None, finish_reason=None)
        result = StepResult(
            step=1, outputs=[output], aborted=[], failures=[], load=worker_pb2.EngineLoad()
        )
        for _ in range(MAX_BEHIND):
            service.publish(result)
        assert engine.requests
        service.publish(result)
        assert not engine.requests
        assert [message async for message in stream] == []

    asyncio.run(asyncio.wait_for(check(), DEADLINE_S))
