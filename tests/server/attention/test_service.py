"""The worker's stream, as the endpoint sees it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from janus_proto.v1 import inference_pb2, worker_pb2
from janus_proto.v1.worker_pb2_grpc import (
    AttentionWorkerServiceStub,
    add_AttentionWorkerServiceServicer_to_server,
)
from janus_server.attention.engine_thread import EngineThread
from janus_server.attention.service import AttentionWorkerService
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

    def load(self) -> worker_pb2.EngineLoad:
        return worker_pb2.EngineLoad(num_blocks=3)


def test_close_ends_the_streams_in_order() -> None:
    async def check() -> None:
        service = AttentionWorkerService()
        service.engine = IdleEngine()  # type: ignore[assignment]
        server = await start_server(
            lambda grpc_server: add_AttentionWorkerServiceServicer_to_server(service, grpc_server),
            [],
            "127.0.0.1:0",
        )
        async with grpc.aio.insecure_channel(server.address) as channel:
            call = AttentionWorkerServiceStub(channel).Run()
            assert (await call.read()).load.num_blocks == 3
            service.close()
            assert await call.read() == grpc.aio.EOF
            assert await call.code() == grpc.StatusCode.OK
        await server.stop(0)

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
