import asyncio
import io
import json
import socket
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from janus_proto.v1 import inference_pb2, worker_pb2
from janus_proto.v1.inference_pb2_grpc import (
    InferenceServiceServicer,
    add_InferenceServiceServicer_to_server,
)
from janus_server.errors import ConfigError, InvalidRequestError, JanusError, UnavailableError
from janus_server.generate import command
from janus_server.grpc_server import MAX_MESSAGE_BYTES
from tests.fakes.endpoint import Endpoint, ids, running_endpoint, within_deadline

LENGTH = inference_pb2.FINISH_REASON_LENGTH
NOWHERE = "127.0.0.1:1"
"""A port on which nothing listens."""


async def begin(
    endpoint: Endpoint, *flags: str
) -> tuple[asyncio.Task[int], worker_pb2.SubmitCommand]:
    """`janus generate`, which blocks, in a thread; and what reaches the worker of it."""
    argv = [*flags, "--endpoint", endpoint.address, "--timeout-s", "60"]
    running = asyncio.create_task(asyncio.to_thread(command, argv))
    return running, await endpoint.worker.submits.get()


def complaint(error: type[JanusError], argv: Sequence[str]) -> str:
    with pytest.raises(error) as raised:
        command(argv)
    sentence = str(raised.value)
    assert sentence
    assert "\n" not in sentence
    return sentence


def test_text_is_streamed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def check() -> None:
        async with running_endpoint(tmp_path) as endpoint:
            running, submit = await begin(endpoint, "Say", "--max-tokens", "6")
            assert list(submit.prompt_ids) == ids("Say")
            assert submit.sampling.max_tokens == 6
            endpoint.worker.put(submit, ids("ca"))
            shown = ""
            while shown != "ca":
                await asyncio.sleep(0.005)
                shown += capsys.readouterr().out
            endpoint.worker.put(submit, ids("fé"), LENGTH)
            assert await running == 0
            assert capsys.readouterr().out == "fé\n"

    within_deadline(check())


def test_flags_become_sampling(tmp_path: Path) -> None:
    flags = "--temperature 0.5 --top-k 3 --top-p 0.5 --min-p 0.25 --seed 8 --ignore-eos"
    stops = ["--stop", "END", "\n\n", "--stop=--", "--stop-token-ids", "5", "6"]

    async def check() -> None:
        async with running_endpoint(tmp_path) as endpoint:
            running, submit = await begin(endpoint, "x", *flags.split(), *stops)
            assert submit.sampling == inference_pb2.SamplingParams(
                temperature=0.5,
                top_k=3,
                top_p=0.5,
                min_p=0.25,
                seed=8,
                max_tokens=50,
                stop=["END", "\n\n", "--"],
                stop_token_ids=[5, 6],
                ignore_eos=True,
            )
            endpoint.worker.put(submit, [], LENGTH)
            await running

    flags += " --max-tokens 50"
    within_deadline(check())


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def check() -> None:
        async with running_endpoint(tmp_path) as endpoint:
            flags = ["--prompt-ids", "12,7, 99", "--json", "--max-tokens", "3", "--logprobs", "1"]
            running, submit = await begin(endpoint, *flags)
            assert list(submit.prompt_ids) == [12, 7, 99]
            logprobs = [
                inference_pb2.TokenLogprobs(logprob=-0.5, top_ids=[top_id], top_logprobs=[-0.25])
                for top_id in (4, 5)
            ]
            endpoint.worker.put(submit, ids("a"), logprobs=logprobs[:1])
            endpoint.worker.put(submit, ids("b"), LENGTH, logprobs[1:])
            assert await running == 0
            assert json.loads(capsys.readouterr().out) == {
                "text": "ab",
                "token_ids": ids("ab"),
                "finish_reason": "length",
                "usage": {"prompt_tokens": 3, "completion_tokens": 2},
                "logprobs": [
                    {"logprob": -0.5, "top": {"4": -0.25}},
                    {"logprob": -0.5, "top": {"5": -0.25}},
                ],
            }

    within_deadline(check())


def test_json_without_logprobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def check() -> None:
        async with running_endpoint(tmp_path) as endpoint:
            running, submit = await begin(endpoint, "x", "--json", "--max-tokens", "3")
            assert not submit.sampling.HasField("logprobs")
            endpoint.worker.put(submit, [0], inference_pb2.FINISH_REASON_STOP)
            await running
            answer = json.loads(capsys.readouterr().out)
            assert answer["finish_reason"] == "stop"
            assert "logprobs" not in answer

    within_deadline(check())


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_stream_that_ends_without_a_reason_is_an_error(flags: list[str]) -> None:
    class CutShort(InferenceServiceServicer):
        def Generate(self, request, context):
            yield inference_pb2.GenerateResponse(text="half an ans")

    server = grpc.server(ThreadPoolExecutor(1))
    add_InferenceServiceServicer_to_server(CutShort(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        sentence = complaint(UnavailableError, ["x", "--endpoint", f"127.0.0.1:{port}", *flags])
    finally:
        server.stop(None).wait(10)
    assert sentence == "the stream ended without a reason: the answer may not be whole"


def test_the_prompt_comes_from_standard_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        async with running_endpoint(tmp_path) as endpoint:
            running, submit = await begin(endpoint, "-", "--max-tokens", "3")
            assert list(submit.prompt_ids) == ids("from a pipe\n")
            endpoint.worker.put(submit, [], LENGTH)
            await running

    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe\n"))
    within_deadline(check())


def test_a_refusal_is_passed_on(tmp_path: Path) -> None:
    async def check() -> None:
        async with running_endpoint(tmp_path) as endpoint:
            argv = ["x", "--top-p", "0", "--endpoint", endpoint.address]
            sentence = await asyncio.to_thread(complaint, InvalidRequestError, argv)
            assert sentence == "top_p is 0, which leaves no token; use temperature 0"
            await endpoint.set_worker_ready(False)
            while endpoint.pool.is_ready:
                await asyncio.sleep(0.005)
            argv = ["x", "--max-tokens", "2", "--endpoint", endpoint.address]
            sentence = await asyncio.to_thread(complaint, UnavailableError, argv)
            assert sentence == "the workers are not ready yet"

    within_deadline(check())


def test_a_deadline_ends_the_request(tmp_path: Path) -> None:
    async def check() -> None:
        async with running_endpoint(tmp_path) as endpoint:
            argv = ["x", "--max-tokens", "2", "--timeout-s", "0.3", "--endpoint", endpoint.address]
            sentence = await asyncio.to_thread(complaint, UnavailableError, argv)
            assert sentence == "no whole answer within 0.3 s"
            submit = await endpoint.worker.submits.get()
            assert await endpoint.worker.aborts.get() == submit.request_id

    within_deadline(check())


def test_an_endpoint_that_says_nothing() -> None:
    """A connection is given as long as the answer, not as long as a retry takes."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        sentence = complaint(UnavailableError, ["x", "--timeout-s", "1", "--endpoint", address])
    assert sentence == "no whole answer within 1 s"


@pytest.mark.parametrize("address", [NOWHERE, "a..b:5"])
def test_nothing_listens(address: str) -> None:
    sentence = complaint(UnavailableError, ["x", "--endpoint", address])
    assert sentence == f"no Janus endpoint answers at {address}"


@pytest.mark.parametrize(
    ("flag", "value", "sentence"),
    [
        ("--endpoint", "nonsense", "'nonsense' is not HOST:PORT"),
        ("--endpoint", "", "'' is not HOST:PORT"),
        ("--endpoint", "localhost:99999", "the port of localhost:99999 is above 65535"),
        ("--timeout-s", "0", "--timeout-s must be at least 0.001, not 0.0"),
        ("--max-tokens", "2147483648", "--max-tokens must be at most 2147483647, not 2147483648"),
        ("--top-p", "nan", "--top-p must be at least 0, not nan"),
        ("--stop-token-ids", "-1", "--stop-token-ids must be at least 0, not -1"),
    ],
)
def test_flags_that_no_call_can_use(flag: str, value: str, sentence: str) -> None:
    assert complaint(ConfigError, ["x", f"{flag}={value}"]) == sentence


def test_a_prompt_beyond_the_largest_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("x" * MAX_MESSAGE_BYTES))
    sentence = complaint(ConfigError, ["-", "--endpoint", NOWHERE])
    assert sentence.startswith("the request has 671")
    assert sentence.endswith(" bytes; up to 67108864 can be sent")


def test_standard_input_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/zero") as endless:
        monkeypatch.setattr(sys, "stdin", endless)
        sentence = complaint(ConfigError, ["-", "--endpoint", NOWHERE])
    assert sentence.endswith(" bytes; up to 67108864 can be sent")


@pytest.mark.parametrize("text", ["12,x", "1,,2", ",", "1.5", "twelve", "12_7", "٣", "9" * 5000])
def test_prompt_ids_that_are_no_numbers(text: str) -> None:
    assert complaint(ConfigError, ["--prompt-ids", text]) == (
        "--prompt-ids must be whole numbers with commas between, like 12,7,99, not " + repr(text)
    )


@pytest.mark.parametrize("argv", [[], [""], ["text", "--prompt-ids", "1"]])
def test_one_prompt_is_needed(argv: list[str]) -> None:
    assert complaint(ConfigError, argv) == "give either a PROMPT or --prompt-ids"


@pytest.mark.parametrize(
    "argv",
    [
        ["--prompt-ids=-1"],
        ["--prompt-ids", "4294967296"],
        ["x\udcff"],
    ],
)
def test_what_no_message_can_hold(argv: list[str]) -> None:
    assert complaint(ConfigError, argv).startswith("the request cannot be sent: ")
