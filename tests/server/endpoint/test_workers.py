import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from janus_proto.v1 import control_pb2, inference_pb2, worker_pb2
from tests.fakes.attention_worker import FakeAttentionWorker
from tests.fakes.endpoint import (
    CALL_S,
    Endpoint,
    begin,
    finished,
    ids,
    refused,
    refused_request,
    request,
    running_endpoint,
    start_worker,
    until,
    within_deadline,
)

LENGTH = inference_pb2.FINISH_REASON_LENGTH
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
NOT_READY = (UNAVAILABLE, "the workers are not ready yet")
LOST = (UNAVAILABLE, "attention worker attention-0 was lost")


async def check_that_it_serves(endpoint: Endpoint) -> None:
    call, submit = await begin(endpoint)
    endpoint.worker.put(submit, ids("ok"), LENGTH)
    assert (await finished(call)).text == "ok"


def test_a_broken_stream_fails_its_requests_and_is_made_again(tmp_path: Path) -> None:
    async def check() -> None:
        async with running_endpoint(tmp_path) as endpoint:
            calls = [(await begin(endpoint))[0] for _ in range(2)]
            endpoint.worker.break_stream()
            for call in calls:
                assert await refused(call) == LOST
            assert await refused_request(endpoint) == NOT_READY
            await until(lambda: endpoint.pool.is_ready)
            await check_that_it_serves(endpoint)
            # The new stream knows nothing of the requests of the old one.
            assert endpoint.worker.aborts.empty()

    within_deadline(check())


def test_nothing_waits_for_the_commands_of_a_lost_stream(tmp_path: Path) -> None:
    def senders() -> int:
        return sum("consume_request_iterator" in repr(task) for task in asyncio.all_tasks())

    async def check() -> None:
        async with running_endpoint(tmp_path) as endpoint:
            await begin(endpoint)
            assert senders() == 1
            endpoint.worker.break_stream()
            await until(lambda: not endpoint.pool.is_ready)
            await until(lambda: endpoint.pool.is_ready)
            assert senders() == 1

    within_deadline(check())


def test_requests_of_a_worker_that_the_controller_lost_fail(tmp_path: Path) -> None:
    async def check() -> None:
        async with running_endpoint(tmp_path) as endpoint:
            call, _ = await begin(endpoint)
            await endpoint.set_worker_ready(False)
            assert await refused(call) == LOST
            assert await refused_request(endpoint) == NOT_READY
            await endpoint.set_worker_ready(True)
            await until(lambda: endpoint.pool.is_ready)
            await check_that_it_serves(endpoint)

    within_deadline(check())


def test_every_worker_must_be_ready(tmp_path: Path) -> None:
    async def check() -> None:
        expert = control_pb2.Worker(worker_id="expert-0", ready=True)
        async with running_endpoint(tmp_path, expert_workers=[expert]) as endpoint:
            call, submit = await begin(endpoint)
            expert.ready = False
            await endpoint.control.publish(endpoint.worker_entry, expert_workers=[expert])
            await until(lambda: not endpoint.pool.is_ready)
            assert await refused_request(endpoint) == NOT_READY
            # What runs goes on: its own worker is there.
            endpoint.worker.put(submit, ids("ok"), LENGTH)
            assert (await finished(call)).text == "ok"
            expert.ready = True
            await endpoint.control.publish(endpoint.worker_entry, expert_workers=[expert])
            await until(lambda: endpoint.pool.is_ready)
            await check_that_it_serves(endpoint)

    within_deadline(check())


def test_a_worker_that_cannot_be_reached_is_not_ready(tmp_path: Path) -> None:
    async def check() -> None:
        nobody = control_pb2.Worker(worker_id="w", address="127.0.0.1:1", ready=True)
        async with running_endpoint(
            tmp_path, other_workers=[nobody], until_ready=False
        ) as endpoint:
            await until(lambda: endpoint.pool.epoch.number == 1)
            assert await refused_request(endpoint) == NOT_READY

    within_deadline(check())


class RefusingWorker(FakeAttentionWorker):
    num_refused = 0

    async def Run(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        self.num_refused += 1
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "scripted to refuse")
        yield


def test_a_worker_that_refuses_every_stream_is_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def check() -> None:
        async with contextlib.AsyncExitStack() as stack:
            worker = RefusingWorker()
            entry = await start_worker("attention-1", worker, stack)
            await stack.enter_async_context(
                running_endpoint(tmp_path, other_workers=[entry], until_ready=False)
            )
            await until(lambda: worker.num_refused == 3)

    within_deadline(check())
    assert caplog.messages.count("lost attention worker attention-1: scripted to refuse") == 1


def test_a_worker_that_says_nothing_is_given_up(tmp_path: Path) -> None:
    async def check() -> None:
        async with running_endpoint(tmp_path, comm_timeout_s=0.2) as endpoint:
            async with asyncio.timeout(20):
                call, _ = await begin(endpoint)
                code, sentence = await refused(call)
            assert code is UNAVAILABLE
            assert sentence == f"{LOST[1]}: it said nothing for 0.2 s"
            # The first message after it shows no more than that there is a connection.
            assert await refused_request(endpoint) == NOT_READY

    within_deadline(check())


def test_a_worker_that_shows_life_may_take_long(tmp_path: Path) -> None:
    async def check() -> None:
        async with running_endpoint(tmp_path, comm_timeout_s=1) as endpoint:
            call, submit = await begin(endpoint)
            for _ in range(5):
                endpoint.worker.show_life()
                await asyncio.sleep(0.3)
            endpoint.worker.put(submit, ids("ok"), LENGTH)
            assert (await finished(call)).text == "ok"

    within_deadline(check())


def test_requests_go_where_the_fewest_are(tmp_path: Path) -> None:
    async def check() -> None:
        async with contextlib.AsyncExitStack() as stack:
            other = FakeAttentionWorker()
            entry = await start_worker("attention-1", other, stack)
            endpoint = await stack.enter_async_context(
                running_endpoint(tmp_path, other_workers=[entry])
            )
            generate = endpoint.stub.Generate
            short = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[1]))
            calls = [generate(short, timeout=CALL_S) for _ in range(4)]
            workers = (endpoint.worker, endpoint.worker, other, other)
            submits = [await worker.submits.get() for worker in workers]
            for worker, submit in zip(workers, submits, strict=True):
                worker.put(submit, ids("ok"), LENGTH)
            for call in calls:
                assert (await finished(call)).text == "ok"

    within_deadline(check())


def test_the_smallest_worker_bounds_the_context(tmp_path: Path) -> None:
    async def check() -> None:
        async with contextlib.AsyncExitStack() as stack:
            small = FakeAttentionWorker(worker_pb2.EngineLoad(max_context=17))
            entry = await start_worker("attention-1", small, stack)
            endpoint = await stack.enter_async_context(
                running_endpoint(tmp_path, other_workers=[entry])
            )
            info = await endpoint.stub.GetModelInfo(
                inference_pb2.GetModelInfoRequest(), timeout=CALL_S
            )
            assert info.max_context == 17
            code, sentence = await refused_request(endpoint, prompt=[1] * 17)
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert "up to 16" in sentence
            longest = request(prompt=[1] * 16)
            calls = [endpoint.stub.Generate(longest, timeout=CALL_S) for _ in range(2)]
            for worker in (endpoint.worker, small):
                assert (await worker.submits.get()).sampling.max_tokens == 1
            for call in calls:
                call.cancel()

    within_deadline(check())
