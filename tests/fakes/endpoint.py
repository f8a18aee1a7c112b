"""A real InferenceService on a real server, over a scripted worker and controller."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from janus_proto.v1 import control_pb2, inference_pb2, worker_pb2
from janus_proto.v1.control_pb2_grpc import (
    ControlServiceServicer,
    add_ControlServiceServicer_to_server,
)
from janus_proto.v1.inference_pb2 import GenerateRequest, GenerateResponse
from janus_proto.v1.inference_pb2_grpc import (
    InferenceServiceStub,
    add_InferenceServiceServicer_to_server,
)
from janus_proto.v1.worker_pb2_grpc import add_AttentionWorkerServiceServicer_to_server
from janus_server.comm.config import CommConfig
from janus_server.comm.control_client import ControlClient
from janus_server.endpoint.config import AdmissionConfig
from janus_server.endpoint.generation import Generation
from janus_server.endpoint.limits import public_limits
from janus_server.endpoint.service import SERVICE_NAME, InferenceService
from janus_server.endpoint.tokenizer import Tokenizer
from janus_server.endpoint.tokenizer_file import read_tokenizer
from janus_server.endpoint.workers import WorkerPool
from janus_server.grpc_server import RunningServer, channel_options, start_server
from janus_server.model import qwen3_moe
from janus_server.model.checkpoint import Checkpoint
from tests.fakes.attention_worker import LOAD, FakeAttentionWorker
from tests.fakes.checkpoints import byte_tokenizer, save_tokenizer
from tests.fakes.model_specs import SMALL_SPEC

DEADLINE_S = 20
CALL_S = 60
"""Deadline of a call, in seconds: longer than a test's, so that it never hides a hang."""
ADMISSION = AdmissionConfig(max_requests=8)
BYTES = byte_tokenizer()


def ids(text: str) -> list[int]:
    """Token ids of a text in the byte tokenizer: a token for each byte."""
    found: list[int] = BYTES.encode(text).ids
    return found


def within_deadline(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run one test."""
    asyncio.run(asyncio.wait_for(coroutine, DEADLINE_S))


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what has no event; the test's deadline bounds it."""
    while not condition():
        await asyncio.sleep(0.005)


class FakeControlService(ControlServiceServicer):
    """Streams its one epoch, and what the test has changed of it."""

    def __init__(self) -> None:
        self.model_fingerprint = ""
        """Of the checkpoint that its workers are said to serve."""
        self.comm_timeout_s = CommConfig().comm_timeout_s
        """Of its workers."""
        self._latest = control_pb2.WatchEpochsResponse()
        self._changed = asyncio.Condition()

    async def publish(
        self,
        *attention_workers: control_pb2.Worker,
        expert_workers: Sequence[control_pb2.Worker] = (),
    ) -> None:
        """Make the epoch of these workers, or change their readiness: a controller does no more."""
        epoch = control_pb2.Epoch(
            number=1, attention_workers=attention_workers, expert_workers=expert_workers
        )
        members = [
            [worker.worker_id for worker in (*known.attention_workers, *known.expert_workers)]
            for known in (self._latest.epoch, epoch)
        ]
        assert not self._latest.HasField("epoch") or members[0] == members[1]
        async with self._changed:
            self._latest = control_pb2.WatchEpochsResponse(epoch=epoch)
            self._changed.notify_all()

    async def WatchEpochs(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async with self._changed:
            while True:
                self._latest.model_fingerprint = self.model_fingerprint
                self._latest.comm_timeout_s = self.comm_timeout_s
                yield self._latest
                await self._changed.wait()

    async def Register(self, request: Any, context: Any) -> Any:
        raise AssertionError("not called")

    async def Heartbeat(self, request: Any, context: Any) -> Any:
        raise AssertionError("not called")

    async def GetExpertLoads(self, request: Any, context: Any) -> Any:
        raise AssertionError("not called")


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """What a test talks to and scripts."""

    address: str
    channel: grpc.aio.Channel
    stub: InferenceServiceStub
    generation: Generation
    server: RunningServer
    pool: WorkerPool
    control: FakeControlService
    worker: FakeAttentionWorker
    worker_entry: control_pb2.Worker

    async def set_worker_ready(self, ready: bool) -> None:
        """Let the controller lose the one worker, or hear of it again."""
        entry = control_pb2.Worker()
        entry.CopyFrom(self.worker_entry)
        entry.ready = ready
        await self.control.publish(entry)


@contextlib.asynccontextmanager
async def running_endpoint(
    folder: Path,
    *,
    admission: AdmissionConfig = ADMISSION,
    comm_timeout_s: float = CALL_S,
    other_workers: Sequence[control_pb2.Worker] = (),
    expert_workers: Sequence[control_pb2.Worker] = (),
    until_ready: bool = True,
    has_tokenizer: bool = True,
    load: worker_pb2.EngineLoad = LOAD,
) -> AsyncIterator[Endpoint]:
    """Start all parts, wait until the endpoint is ready, and end them on leaving.

    The epoch has a scripted worker and, where given, others beside it.
    """
    async with contextlib.AsyncExitStack() as stack:
        control_service, worker = FakeControlService(), FakeAttentionWorker(load)
        control_service.comm_timeout_s = comm_timeout_s
        control_server = await start_server(
            lambda server: add_ControlServiceServicer_to_server(control_service, server),
            [],
            "127.0.0.1:0",
        )
        stack.push_async_callback(control_server.stop, 0)
        entry = await start_worker("attention-0", worker, stack)
        control = ControlClient(control_server.address)
        stack.push_async_callback(control.close)
        pool = WorkerPool(control, model_fingerprint="", comm_timeout_s=comm_timeout_s)
        stack.push_async_callback(_cancel, asyncio.create_task(pool.follow()))
        generation = Generation(
            SMALL_SPEC,
            _tokenizer(folder, stack) if has_tokenizer else None,
            pool,
            max_context=SMALL_SPEC.max_context,
            max_requests=admission.max_requests,
        )
        service = InferenceService(
            Checkpoint(path=folder, spec=SMALL_SPEC, family=qwen3_moe.FAMILY, tensors={}),
            generation,
            pool,
        )
        server = await start_server(
            lambda grpc_server: add_InferenceServiceServicer_to_server(service, grpc_server),
            [SERVICE_NAME],
            "127.0.0.1:0",
            public_limits(admission, max_context=SMALL_SPEC.max_context),
        )
        stack.push_async_callback(server.stop, 0)
        channel = await stack.enter_async_context(
            grpc.aio.insecure_channel(server.address, options=channel_options())
        )
        await control_service.publish(entry, *other_workers, expert_workers=expert_workers)
        await until(lambda: pool.is_ready or not until_ready)
        yield Endpoint(
            address=server.address,
            channel=channel,
            stub=InferenceServiceStub(channel),
            generation=generation,
            server=server,
            pool=pool,
            control=control_service,
            worker=worker,
            worker_entry=entry,
        )


async def start_worker(
    worker_id: str, worker: FakeAttentionWorker, stack: contextlib.AsyncExitStack
) -> control_pb2.Worker:
    """Serve a scripted worker until `stack` ends; its entry in an epoch."""
    server = await start_server(
        lambda grpc_server: add_AttentionWorkerServiceServicer_to_server(worker, grpc_server),
        [],
        "127.0.0.1:0",
    )
    stack.push_async_callback(server.stop, 0)
    return control_pb2.Worker(
        worker_id=worker_id,
        role=control_pb2.WORKER_ROLE_ATTENTION,
        address=server.address,
        ready=True,
    )


def _tokenizer(folder: Path, stack: contextlib.AsyncExitStack) -> Tokenizer:
    tokenizer = Tokenizer(read_tokenizer(save_tokenizer(folder, BYTES)))
    stack.callback(tokenizer.close)
    return tokenizer


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})


def request(
    prompt: Sequence[int] | str = (1, 2), request_id: str = "", **sampling: Any
) -> GenerateRequest:
    """A request for token ids or a text, all else as `sampling` says."""
    made = GenerateRequest(request_id=request_id, sampling=inference_pb2.SamplingParams(**sampling))
    if isinstance(prompt, str):
        made.text = prompt
    else:
        made.token_ids.ids.extend(prompt)
    return made


async def begin(endpoint: Endpoint, **fields: Any) -> tuple[Any, worker_pb2.SubmitCommand]:
    """A call whose request the worker has received, and what it has received."""
    call = endpoint.stub.Generate(request(**fields), timeout=CALL_S)
    # The call is sent even if nobody reads it, but its failure must not be waited for.
    submitted = asyncio.ensure_future(endpoint.worker.submits.get())
    ended = asyncio.ensure_future(call.code())
    await asyncio.wait({submitted, ended}, return_when=asyncio.FIRST_COMPLETED)
    assert submitted.done(), await call.details()
    ended.cancel()
    return call, submitted.result()


def overfill(endpoint: Endpoint, submit: worker_pb2.SubmitCommand) -> int:
    """Put more output than can be sent to a client that does not read it, one token each.

    Returns the number of outputs.
    """
    num_outputs = 64
    logprobs = inference_pb2.TokenLogprobs(top_ids=[2**31] * 40_000)
    for _ in range(num_outputs):
        endpoint.worker.put(submit, ids("x"), logprobs=[logprobs])
    return num_outputs


async def finished(call: Any) -> GenerateResponse:
    """All of a stream's messages as one."""
    whole = GenerateResponse()
    while isinstance(response := await call.read(), GenerateResponse):
        assert not whole.finish_reason, "nothing follows the last message"
        text = whole.text + response.text
        whole.MergeFrom(response)
        whole.text = text
    return whole


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    """Status and sentence of a call that fails."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await finished(call)
    sentence = raised.value.details()
    assert sentence
    assert "\n" not in sentence
    return raised.value.code(), sentence


async def refused_request(endpoint: Endpoint, **fields: Any) -> tuple[grpc.StatusCode, str]:
    """Status and sentence of a request that is refused."""
    return await refused(endpoint.stub.Generate(request(**fields), timeout=CALL_S))
