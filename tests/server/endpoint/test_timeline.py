"""What the log says of each request."""

import logging
import re
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from janus_proto.v1 import inference_pb2
from janus_server.endpoint.config import AdmissionConfig
from tests.fakes.endpoint import (
    Endpoint,
    begin,
    finished,
    ids,
    overfill,
    refused,
    refused_request,
    request,
    running_endpoint,
    until,
    within_deadline,
)
from tests.fakes.http2 import raw_connection

GENERATE = b"/janus.v1.InferenceService/Generate"
LENGTH = inference_pb2.FINISH_REASON_LENGTH


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    name = "janus_server.endpoint.timeline"
    return [
        record.getMessage()
        for record in caplog.records
        if (record.name, record.levelname) == (name, "INFO")
    ]


async def finish_one(endpoint: Endpoint) -> None:
    call, submit = await begin(endpoint, request_id="mine")
    endpoint.worker.put(submit, [1], LENGTH)
    await finished(call)


async def cancel_one(endpoint: Endpoint) -> None:
    call, _ = await begin(endpoint, request_id="mine")
    call.cancel()


async def cancel_one_unread(endpoint: Endpoint) -> None:
    call, submit = await begin(endpoint, request_id="mine")
    overfill(endpoint, submit)
    await call.read()
    call.cancel()


async def let_one_expire(endpoint: Endpoint) -> None:
    await refused(endpoint.stub.Generate(request(request_id="mine"), timeout=0.3))


async def lose_the_worker_of_one(endpoint: Endpoint) -> None:
    call, _ = await begin(endpoint, request_id="mine")
    await endpoint.set_worker_ready(False)
    await refused(call)


async def refuse_one(endpoint: Endpoint) -> None:
    await refused_request(endpoint, request_id="mine", prompt=[256])


async def refuse_one_for_its_id(endpoint: Endpoint) -> None:
    await refused_request(endpoint, request_id="two\nlines")


async def stall_one(endpoint: Endpoint) -> None:
    async with raw_connection(endpoint.address, window=0) as stalled:
        await stalled.call(1, GENERATE, request(request_id="mine").SerializeToString())
        endpoint.worker.put(await endpoint.worker.submits.get(), ids("x"))
        await endpoint.worker.aborts.get()


CANCELLED = r"request mine: cancelled after \d+ ms, by its client or its deadline"
REFUSED = r"request mine: failed after \d+ ms: the prompt has the token id 256"


@pytest.mark.parametrize(
    ("scene", "line"),
    [
        (finish_one, "request mine: length, 2 prompt and 1 completion tokens, TTFT"),
        (cancel_one, CANCELLED),
        (cancel_one_unread, CANCELLED),
        (let_one_expire, CANCELLED),
        (lose_the_worker_of_one, r"request mine: failed after \d+ ms: .* was lost"),
        (stall_one, r"request mine: failed after \d+ ms: the client took no message for 0.1 s"),
        (refuse_one, REFUSED),
        (refuse_one_for_its_id, r"request without a usable id: failed .* 'two\\nlines' of 9"),
    ],
)
def test_every_request_has_one_line_in_the_log(
    scene: Callable[[Endpoint], Coroutine[Any, Any, None]],
    line: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def check() -> None:
        admission = AdmissionConfig(client_stall_timeout_s=0.1)
        async with running_endpoint(tmp_path, admission=admission) as endpoint:
            await scene(endpoint)
            await until(lambda: bool(logged(caplog)))

    caplog.set_level(logging.INFO)
    within_deadline(check())
    assert len(logged(caplog)) == 1
    assert re.match(line, logged(caplog)[0])
