"""The endpoint's process from start to stop, in this process."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from janus_proto.v1 import control_pb2, inference_pb2
from janus_proto.v1.control_pb2_grpc import add_ControlServiceServicer_to_server
from janus_proto.v1.inference_pb2_grpc import InferenceServiceStub
from janus_proto.v1.worker_pb2_grpc import add_AttentionWorkerServiceServicer_to_server
from janus_server.endpoint.__main__ import main
from janus_server.endpoint.config import AdmissionConfig, EndpointConfig
from janus_server.errors import ConfigError, UnavailableError
from janus_server.grpc_server import start_server
from janus_server.model.checkpoint import Checkpoint
from janus_server.model.config import ModelConfig
from janus_server.process import announced_address
from tests.conftest import CheckpointFactory
from tests.fakes.attention_worker import FakeAttentionWorker
from tests.fakes.endpoint import FakeControlService, until, within_deadline

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class BreakableControlService(FakeControlService):
    """Refuses for good once `broken` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = asyncio.Event()

    async def WatchEpochs(self, request: Any, context: Any) -> AsyncIterator[Any]:
        epochs = super().WatchEpochs(request, context)
        while not self.broken.is_set():
            waits = {asyncio.ensure_future(anext(epochs)), asyncio.create_task(self.broken.wait())}
            done, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for task in pending:
                task.cancel()
            for task in done:
                if task.result() is not True:
                    yield task.result()
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "scripted to break")


@contextlib.asynccontextmanager
async def listening(add: Any, servicer: Any) -> AsyncIterator[str]:
    server = await start_server(lambda grpc_server: add(servicer, grpc_server), [], "127.0.0.1:0")
    try:
        yield server.address
    finally:
        await server.stop(0)


@contextlib.asynccontextmanager
async def running_process(
    checkpoint: str, control: FakeControlService, worker: FakeAttentionWorker, stop: asyncio.Event
) -> AsyncIterator[asyncio.Task[None]]:
    control.model_fingerprint = (
        control.model_fingerprint or Checkpoint.open(checkpoint).fingerprint()
    )
    async with (
        listening(add_ControlServiceServicer_to_server, control) as controller,
        listening(add_AttentionWorkerServiceServicer_to_server, worker) as address,
    ):
        config = EndpointConfig(
            model=ModelConfig(checkpoint=checkpoint),
            admission=AdmissionConfig(listen="127.0.0.1:0"),
            controller=controller,
        )
        control.entry = control_pb2.Worker(worker_id="attention-0", address=address, ready=True)
        running = asyncio.create_task(main(config, stop))
        try:
            yield running
        finally:
            running.cancel()
            await asyncio.wait({running})


async def announced(capsys: pytest.CaptureFixture[str]) -> str:
    while not (address := announced_address(capsys.readouterr().out)):
        await asyncio.sleep(0.005)
    return address


async def wait_for_health(channel: grpc.aio.Channel, status: int) -> None:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    for service in ("", "janus.v1.InferenceService"):
        request = health_pb2.HealthCheckRequest(service=service)
        while (await stub.Check(request)).status != status:
            await asyncio.sleep(0.005)


def a_request() -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[1]))


def test_an_endpoint_with_another_model_than_the_workers_ends(
    make_checkpoint: CheckpointFactory,
) -> None:
    async def scenario() -> None:
        control, worker, stop = FakeControlService(), FakeAttentionWorker(), asyncio.Event()
        control.model_fingerprint = "another"
        async with running_process(str(make_checkpoint()), control, worker, stop) as running:
            with pytest.raises(ExceptionGroup) as caught:
                await running
            assert caught.group_contains(ConfigError, match="serves another model")

    within_deadline(scenario())


def test_an_endpoint_with_another_timeout_than_the_workers_ends(
    make_checkpoint: CheckpointFactory,
) -> None:
    async def scenario() -> None:
        control, worker, stop = FakeControlService(), FakeAttentionWorker(), asyncio.Event()
        control.comm_timeout_s = 2.0
        async with running_process(str(make_checkpoint()), control, worker, stop) as running:
            with pytest.raises(ExceptionGroup) as caught:
                await running
            assert caught.group_contains(
                ConfigError, match=r"has --comm-timeout-s 60\.0, the controller .* 2\.0"
            )

    within_deadline(scenario())


def test_from_start_to_stop(
    make_checkpoint: CheckpointFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        control, worker, stop = FakeControlService(), FakeAttentionWorker(), asyncio.Event()
        async with (
            running_process(str(make_checkpoint()), control, worker, stop) as running,
            grpc.aio.insecure_channel(await announced(capsys)) as channel,
        ):
            await wait_for_health(channel, NOT_SERVING)
            await control.publish(control.entry)
            await wait_for_health(channel, SERVING)
            stub: Any = InferenceServiceStub(channel)
            call = stub.Generate(a_request())
            submit = await worker.submits.get()
            stop.set()
            await wait_for_health(channel, NOT_SERVING)
            worker.put(submit, [1], inference_pb2.FINISH_REASON_LENGTH)
            responses = [response async for response in call]
            assert responses[-1].finish_reason == inference_pb2.FINISH_REASON_LENGTH
            await running

    within_deadline(scenario())


def test_without_its_controller_it_ends_with_a_sentence(
    make_checkpoint: CheckpointFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        control, worker = BreakableControlService(), FakeAttentionWorker()
        async with (
            running_process(str(make_checkpoint()), control, worker, asyncio.Event()) as running,
            grpc.aio.insecure_channel(await announced(capsys)) as channel,
        ):
            await control.publish(control.entry)
            await wait_for_health(channel, SERVING)
            stub: Any = InferenceServiceStub(channel)
            call = stub.Generate(a_request())
            await worker.submits.get()
            control.broken.set()
            # By itself: a `main` that is cancelled would raise the same.
            await until(running.done)
            error = running.exception()
            assert isinstance(
                error, ExceptionGroup
            )  # out of which `process.run` takes the sentence
            assert [type(inner) for inner in error.exceptions] == [UnavailableError]
            assert "the controller at" in str(error.exceptions[0])
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call.read()
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE

    within_deadline(scenario())
