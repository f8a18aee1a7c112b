"""What hostile clients cost an endpoint that is a process of its own."""

import asyncio
import contextlib
import json
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from janus_bench.demo import DEMO_CHECKPOINT
from janus_proto.v1 import inference_pb2
from tests.fakes.endpoint import finished, request, within_deadline
from tests.fakes.endpoint_process import EndpointProcess, endpoint_process

pytestmark = pytest.mark.e2e

GENERATE = "/janus.v1.InferenceService/Generate"
GROWTH_BYTES = 30 * 2**20


def delimited(number: int, content: bytes) -> bytes:
    length, varint = len(content), b""
    while length >= 128:
        varint += bytes([length & 127 | 128])
        length >>= 7
    return bytes([number << 3 | 2]) + varint + bytes([length]) + content


def hostile(size: int) -> dict[str, bytes]:
    """Requests of about this many bytes that mean much work for who parses them."""
    return {
        "empty stop strings": delimited(4, b"\x3a\x00" * (size // 2)),
        "stop token ids": delimited(4, delimited(8, b"\x01" * size)),
        "prompt ids": delimited(3, delimited(1, b"\x01" * size)),
        "unpacked prompt ids": delimited(3, b"\x08\x01" * (size // 2)),
        "unknown fields": b"\x50\x01" * (size // 2),
        "nested groups": b"\x53" * (size // 2) + b"\x54" * (size // 2),
        "request id": delimited(1, b"x" * size),
        "text": delimited(2, b"word " * (size // 5)),
        "one token": delimited(2, b"x" * size),
    }


async def end_of(channel: grpc.aio.Channel, data: bytes) -> grpc.StatusCode:
    call: Any = channel.unary_stream(GENERATE)(data, timeout=60)
    return await call.code()


async def check_memory(endpoint: EndpointProcess, requests: dict[str, bytes]) -> None:
    """Six of each at once, while another request runs; none costs much."""
    running = endpoint.stub.Generate(request(request_id="running", ignore_eos=True))
    submit = await endpoint.worker.submits.get()
    before = endpoint.memory_bytes()
    async with grpc.aio.insecure_channel(
        endpoint.address, [("grpc.max_send_message_length", -1)]
    ) as channel:
        for name, data in requests.items():
            codes = await asyncio.gather(*(end_of(channel, data) for _ in range(6)))
            refused = {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT}
            assert set(codes) <= refused, name
            assert endpoint.memory_bytes() - before < GROWTH_BYTES, name
    endpoint.worker.put(submit, [1], inference_pb2.FINISH_REASON_LENGTH)
    assert (await finished(running)).usage.completion_tokens == 1


@pytest.mark.parametrize("size", [60_000, 6_000_000])
def test_requests_that_would_take_much_to_parse(size: int) -> None:
    async def check() -> None:
        async with endpoint_process(Path(DEMO_CHECKPOINT)) as endpoint:
            await check_memory(endpoint, hostile(size))

    within_deadline(check())


def test_running_requests_do_not_hold_their_prompts(tmp_path: Path) -> None:
    folder = tmp_path / "long context"
    shutil.copytree(DEMO_CHECKPOINT, folder)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 2**16
    (folder / "config.json").write_text(json.dumps(config))
    prompt = list(range(1000, 2000)) * 60

    async def check() -> None:
        async with endpoint_process(folder) as endpoint:
            calls = []
            sizes = []
            for _ in range(40):
                calls.append(endpoint.stub.Generate(request(prompt=prompt)))
                await endpoint.worker.submits.get()
                sizes.append(endpoint.memory_bytes())
            # The first ones bring memory that is used again.
            assert sizes[-1] - sizes[10] < GROWTH_BYTES

    within_deadline(check())


@contextlib.asynccontextmanager
async def stopped_clients(endpoint: EndpointProcess, count: int) -> AsyncIterator[None]:
    """Requests of a client process that was stopped, whose streams are full."""
    client = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.fakes.client_process", endpoint.address, str(count)),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        submits = [await endpoint.worker.submits.get() for _ in range(count)]
        for submit in submits:
            endpoint.worker.put(submit, [1])
        assert client.stdout is not None
        await client.stdout.readline()
        client.send_signal(signal.SIGSTOP)
        logprobs = inference_pb2.TokenLogprobs(top_ids=range(2**20, 2**20 + 20_000))
        for submit in submits:
            for _ in range(2):
                endpoint.worker.put(submit, [1], logprobs=[logprobs])
        yield
    finally:
        client.kill()
        await client.wait()


def test_clients_that_are_stopped_lose_their_places() -> None:
    async def check() -> None:
        flags = ("--max-requests", "8", "--client-stall-timeout-s", "0.5")
        async with (
            endpoint_process(Path(DEMO_CHECKPOINT), *flags) as endpoint,
            stopped_clients(endpoint, 8),
        ):
            for _ in range(8):
                await endpoint.worker.aborts.get()
            call = endpoint.stub.Generate(request())
            endpoint.worker.put(
                await endpoint.worker.submits.get(), [1], inference_pb2.FINISH_REASON_LENGTH
            )
            assert (await finished(call)).usage.completion_tokens == 1

    within_deadline(check())


def test_clients_that_are_stopped_do_not_hold_up_the_end() -> None:
    async def check() -> None:
        async with (
            endpoint_process(Path(DEMO_CHECKPOINT), "--drain-timeout-s", "0.5") as endpoint,
            stopped_clients(endpoint, 8),
        ):
            endpoint.process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(endpoint.process.wait(), 10) == 0

    within_deadline(check())
