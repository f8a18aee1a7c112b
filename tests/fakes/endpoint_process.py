"""An endpoint in a process of its own, over a scripted worker and controller in this one."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from janus_proto.v1.control_pb2_grpc import add_ControlServiceServicer_to_server
from janus_proto.v1.inference_pb2_grpc import InferenceServiceStub
from janus_server.grpc_server import channel_options, start_server
from janus_server.model.checkpoint import Checkpoint
from janus_server.process import announced_address
from tests.fakes.attention_worker import FakeAttentionWorker
from tests.fakes.endpoint import FakeControlService, start_worker


@dataclass(frozen=True, kw_only=True, slots=True)
class EndpointProcess:
    """What a test talks to, scripts and measures."""

    process: asyncio.subprocess.Process
    address: str
    stub: InferenceServiceStub
    worker: FakeAttentionWorker

    def memory_bytes(self) -> int:
        """Resident memory of the endpoint."""
        return psutil.Process(self.process.pid).memory_info().rss


@contextlib.asynccontextmanager
async def endpoint_process(checkpoint: Path, *flags: str) -> AsyncIterator[EndpointProcess]:
    """Start it, wait until it serves, and end it on leaving."""
    async with contextlib.AsyncExitStack() as stack:
        control, worker = FakeControlService(), FakeAttentionWorker()
        control.model_fingerprint = Checkpoint.open(checkpoint).fingerprint()
        controller = await start_server(
            lambda server: add_ControlServiceServicer_to_server(control, server), [], "127.0.0.1:0"
        )
        stack.push_async_callback(controller.stop, 0)
        await control.publish(await start_worker("attention-0", worker, stack))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "janus_server.endpoint", "--listen", "127.0.0.1:0"),
            *("--controller", controller.address, *flags, str(checkpoint)),
            stdout=asyncio.subprocess.PIPE,
        )
        stack.push_async_callback(_end, process)
        assert process.stdout is not None
        address = announced_address((await process.stdout.readline()).decode())
        assert address is not None
        channel = await stack.enter_async_context(
            grpc.aio.insecure_channel(address, options=channel_options())
        )
        health = health_pb2_grpc.HealthStub(channel)
        async for response in health.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True):
            if response.status == health_pb2.HealthCheckResponse.SERVING:
                break
        yield EndpointProcess(
            process=process, address=address, stub=InferenceServiceStub(channel), worker=worker
        )


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()
