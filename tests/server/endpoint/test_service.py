import asyncio
from pathlib import Path

import grpc
import grpc.aio
import pytest

from janus_proto.v1 import inference_pb2, worker_pb2
from janus_proto.v1.inference_pb2 import GenerateRequest
from janus_server.endpoint.config import AdmissionConfig
from tests.fakes.endpoint import (
    CALL_S,
    Endpoint,
    begin,
    finished,
    ids,
    overfill,
    refused,
    refused_request,
    request,
    running_endpoint,
    within_deadline,
)
from tests.fakes.http2 import raw_connection
from tests.fakes.model_specs import SMALL_SPEC

GENERATE = b"/janus.v1.InferenceService/Generate"

STOP = inference_pb2.FINISH_REASON_STOP
LENGTH = inference_pb2.FINISH_REASON_LENGTH
ABORT = inference_pb2.FINISH_REASON_ABORT
Code = grpc.StatusCode


async def flood(endpoint: Endpoint, submit: worker_pb2.SubmitCommand) -> int:
    """Let a request have more output than can be sent to a client that does not read it.

    Returns the number of outputs, each of one token, when the endpoint has all of them.
    """
    num_outputs = overfill(endpoint, submit)
    # What comes for another request comes after all of these.
    call, other = await begin(endpoint)
    endpoint.worker.put(other, [1], LENGTH)
    await finished(call)
    return num_outputs


def test_text_in_text_out(tmp_path: Path) -> None:
    async def check() -> None:
        async with running_endpoint(tmp_path) as endpoint:
            call, submit = await begin(endpoint, prompt="Hé", temperature=0.0, max_tokens=5)
            assert list(submit.prompt_ids) == ids("Hé")
            assert submit.sampling.temperature == 0.0
            assert list(submit.sampling.stop_token_ids) == list(SMALL_SPEC.eos_token_ids)
            endpoint.worker.put(submit, ids("Bo"))
            first = await call.read()
            assert (first.text, list(first.token_ids)) == ("Bo", ids("Bo"))
            assert not first.HasField("usage")
            endpoint.worker.put(submit, ids("né!")[:3], LENGTH)
            last = await finished(call)
            assert (last.text, last.finish_reason) == ("né", LENGTH)
            assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, 5)
            assert first.request_id == last.request_id != ""
            assert endpoint.worker.aborts.empty()

    within_deadline(check())


def test_two_streams_interleave(tmp_path: Path) -> None:
    async def check() -> None:
        async with running_endpoint(tmp_path) as endpoint:
            calls, submits = zip(
                await begin(endpoint, request_id="a"),
                await begin(endpoint, request_id="b"),
                strict=True,
            )
            for character in "xyz":
                for call, submit, prefix in zip(calls, submits, "AB", strict=True):
                    endpoint.worker.put(submit, ids(prefix + character))
                    response = await call.read()
                    assert response.text == prefix + character
            for call, submit, name in zip(calls, submits, "ab", strict=True):
                endpoint.worker.put(submit, [], LENGTH)
                last = await finished(call)
                assert (last.request_id, last.usage.completion_tokens) == (name, 6)

    within_deadline(check())


def test_cancelling_the_call_aborts_at_the_worker(tmp_path: Path) -> None:
    async def check() -> None:
        async with running_endpoint(tmp_path) as endpoint:
            call, submit = await begin(endpoint)
            call.cancel()
            assert await endpoint.worker.aborts.get() == submit.request_id

    within_deadline(check())


def test_cancelling_a_call_that_is_not_read_aborts_at_the_worker(tmp_path: Path) -> None:
    async def check() -> None:
        async with running_endpoint(tmp_path) as endpoint:
            call, submit = await begin(endpoint)
            await flood(endpoint, submit)
            call.cancel()
            assert await endpoint.worker.aborts.get() == submit.request_id

    within_deadline(check())


def test_a_deadline_aborts_at_the_worker(tmp_path: Path) -> None:
    async def check() -> None:
        async with running_endpoint(tmp_path) as endpoint:
            call = endpoint.stub.Generate(request(), timeout=0.3)
            assert (await refused(call))[0] is Code.DEADLINE_EXCEEDED
            submit = await endpoint.worker.submits.get()
            assert await endpoint.worker.aborts.get() == submit.request_id

    within_deadline(check())


def test_an_id_can_be_used_again_while_the_worker_still_ends_the_last(tmp_path: Path) -> None:
    async def check() -> None:
        async with running_endpoint(tmp_path) as endpoint:
            call, old = await begin(endpoint, request_id="r")
            call.cancel()
            await endpoint.worker.aborts.get()
            call, new = await begin(endpoint, request_id="r")
            endpoint.worker.put(old, ids("old"))
            endpoint.worker.put(old, [], ABORT)
            endpoint.worker.put(new, ids("new"), LENGTH)
            last = await finished(call)
            assert (last.text, last.finish_reason) == ("new", LENGTH)

    within_deadline(check())


def test_full_and_free_again(tmp_path: Path) -> None:
    async def check() -> None:
        async with running_endpoint(
            tmp_path, admission=AdmissionConfig(max_requests=2)
        ) as endpoint:
            first, first_submit = await begin(endpoint)
            second, second_submit = await begin(endpoint)
            code, sentence = await refused_request(endpoint)
            assert code is Code.RESOURCE_EXHAUSTED
            assert sentence == "2 requests are running or queued already; try again later"
            endpoint.worker.put(first_submit, [7], LENGTH)
            await finished(first)
            third, third_submit = await begin(endpoint)
            for call, submit in ((second, second_submit), (third, third_submit)):
                endpoint.worker.put(submit, [7], LENGTH)
                assert (await finished(call)).finish_reason == LENGTH

    within_deadline(check())


def test_abort_ends_the_stream_with_what_has_come(tmp_path: Path) -> None:
    async def check() -> None:
        async with running_endpoint(tmp_path) as endpoint:
            call, submit = await begin(endpoint, request_id="r")
            endpoint.worker.put(submit, ids("so f"))
            await call.read()
            await endpoint.stub.Abort(inference_pb2.AbortRequest(request_id="r"), timeout=CALL_S)
            last = await finished(call)
            assert last.finish_reason == ABORT
            assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (2, 4)
            assert await endpoint.worker.aborts.get() == submit.request_id

    within_deadline(check())


def test_a_request_that_the_worker_fails_ends_alone(tmp_path: Path) -> None:
    async def check() -> None:
        async with running_endpoint(tmp_path) as endpoint:
            failing, failing_submit = await begin(endpoint)
            other, other_submit = await begin(endpoint)
            endpoint.worker.put(failing_submit, [], ABORT, failure="its logits are not finite")
            assert await refused(failing) == (
                grpc.StatusCode.INTERNAL,
                "its logits are not finite",
            )
            endpoint.worker.put(other_submit, ids("fine"), LENGTH)
            assert (await finished(other)).text == "fine"

    within_deadline(check())


def test_abort_of_what_does_not_run(tmp_path: Path) -> None:
    async def check() -> None:
        async with running_endpoint(tmp_path) as endpoint:
            for request_id in ("", "nobody"):
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await endpoint.stub.Abort(
                        inference_pb2.AbortRequest(request_id=request_id), timeout=CALL_S
                    )
                assert raised.value.code() is Code.NOT_FOUND
                assert raised.value.details() == "no request with this request_id is running"

    within_deadline(check())


def test_a_stop_string_across_deltas(tmp_path: Path) -> None:
    async def check() -> None:
        async with running_endpoint(tmp_path) as endpoint:
            call, submit = await begin(endpoint, stop=["END", "never"])
            endpoint.worker.put(submit, ids("the E"))
            assert (await call.read()).text == "the "
            endpoint.worker.put(submit, ids("ND of"))
            last = await finished(call)
            assert (last.text, last.matched_stop, last.finish_reason) == ("", "END", STOP)
            # Up to the token that completes the stop string; the worker knew no better.
            assert list(last.token_ids) == ids("ND")
            assert last.usage.completion_tokens == 7
            assert await endpoint.worker.aborts.get() == submit.request_id

    within_deadline(check())


def test_an_end_token_shows_its_id_and_no_text(tmp_path: Path) -> None:
    async def check() -> None:
        async with running_endpoint(tmp_path) as endpoint:
            end = ids("!")
            call, submit = await begin(endpoint, stop_token_ids=end)
            assert list(submit.sampling.stop_token_ids) == [*end, *SMALL_SPEC.eos_token_ids]
            endpoint.worker.put(submit, ids("bye!"), STOP)
            last = await finished(call)
            assert (last.text, list(last.token_ids)) == ("bye", ids("bye!"))
            assert (last.finish_reason, last.matched_stop) == (STOP, "")
            assert last.usage.completion_tokens == 4

    within_deadline(check())


def test_ignore_eos_shows_it_as_text(tmp_path: Path) -> None:
    async def check() -> None:
        async with running_endpoint(tmp_path) as endpoint:
            call, submit = await begin(endpoint, ignore_eos=True)
            assert submit.sampling.ignore_eos
            assert list(submit.sampling.stop_token_ids) == []
            endpoint.worker.put(submit, [*ids("a"), 0], LENGTH)
            assert (await finished(call)).text == "a!"

    within_deadline(check())


def test_an_id_in_use(tmp_path: Path) -> None:
    async def check() -> None:
        async with running_endpoint(tmp_path) as endpoint:
            call, submit = await begin(endpoint, request_id="r")
            code, sentence = await refused_request(endpoint, request_id="r")
            assert code is Code.ALREADY_EXISTS
            assert sentence == "request_id r is in use by a running request"
            endpoint.worker.put(submit, [7], LENGTH)
            assert (await finished(call)).finish_reason == LENGTH

    within_deadline(check())


def test_a_slow_client_gets_merged_deltas(tmp_path: Path) -> None:
    async def check() -> None:
        async with running_endpoint(tmp_path) as endpoint:
            call, submit = await begin(endpoint)
            num_outputs = await flood(endpoint, submit)
            endpoint.worker.put(submit, [], LENGTH)
            deltas = [response async for response in call]
            assert len(deltas) < num_outputs
            assert deltas[-1].usage.completion_tokens == num_outputs
            assert sum(len(delta.token_ids) for delta in deltas) == num_outputs

    within_deadline(check())


def test_a_client_that_takes_nothing_gives_its_place_back(tmp_path: Path) -> None:
    async def check() -> None:
        admission = AdmissionConfig(max_requests=1, client_stall_timeout_s=0.1)
        async with (
            running_endpoint(tmp_path, admission=admission) as endpoint,
            raw_connection(endpoint.address, window=0) as stalled,
        ):
            await stalled.call(1, GENERATE, request().SerializeToString())
            submit = await endpoint.worker.submits.get()
            endpoint.worker.put(submit, ids("x"))
            assert await endpoint.worker.aborts.get() == submit.request_id
            await begin(endpoint)

    within_deadline(check())


def test_logprobs_pass_through(tmp_path: Path) -> None:
    async def check() -> None:
        async with running_endpoint(tmp_path) as endpoint:
            call, submit = await begin(endpoint, logprobs=2, stop=["b"])
            assert submit.sampling.logprobs == 2
            logprobs = [
                inference_pb2.TokenLogprobs(logprob=-i, top_ids=[i, i + 1], top_logprobs=[-0.5, -i])
                for i in range(3)
            ]
            endpoint.worker.put(submit, ids("abc"), LENGTH, logprobs)
            last = await finished(call)
            assert list(last.logprobs) == logprobs[:2]
            assert list(last.token_ids) == ids("ab")

    within_deadline(check())


def test_without_a_tokenizer_ids_alone_are_served(tmp_path: Path) -> None:
    async def check() -> None:
        async with running_endpoint(tmp_path, has_tokenizer=False) as endpoint:
            code, sentence = await refused_request(endpoint, prompt="text")
            assert (code, "send token ids" in sentence) == (Code.INVALID_ARGUMENT, True)
            code, sentence = await refused_request(endpoint, stop=["x"])
            assert (code, "stop_token_ids" in sentence) == (Code.INVALID_ARGUMENT, True)
            call, submit = await begin(endpoint, prompt=[3])
            endpoint.worker.put(submit, [4, 0], STOP)
            last = await finished(call)
            assert (list(last.token_ids), last.text) == ([4, 0], "")

    within_deadline(check())


def test_requests_out_of_bounds(tmp_path: Path) -> None:
    async def check() -> None:
        async with running_endpoint(tmp_path) as endpoint:
            no_prompt = GenerateRequest()
            for bad in (
                no_prompt,
                request(prompt=[]),
                request(prompt=""),
                request(prompt=[256]),
                request(prompt=[1] * 64),
                request(prompt=[1] * 60, max_tokens=5),
                request(temperature=-1.0),
                request(request_id="two words"),
            ):
                code, _ = await refused(endpoint.stub.Generate(bad, timeout=CALL_S))
                assert code is Code.INVALID_ARGUMENT
            assert endpoint.worker.submits.empty()
            # None of them takes a place.
            await begin(endpoint)

    within_deadline(check())


def test_model_info(tmp_path: Path) -> None:
    async def check() -> None:
        async with running_endpoint(tmp_path) as endpoint:
            info = await endpoint.stub.GetModelInfo(
                inference_pb2.GetModelInfoRequest(), timeout=CALL_S
            )
            assert (info.model_name, info.family) == (tmp_path.name, "qwen3_moe")
            assert (info.vocab_size, info.max_context) == (256, 64)
            assert (info.num_layers, info.num_moe_layers, info.num_experts) == (3, 2, 5)
            assert list(info.eos_token_ids) == [0]
            assert (info.num_attention_workers, info.num_expert_workers) == (1, 0)
            assert info.version

    within_deadline(check())


def test_drain_lets_running_requests_finish_and_refuses_new_ones(tmp_path: Path) -> None:
    async def check() -> None:
        async with running_endpoint(tmp_path) as endpoint:
            call, submit = await begin(endpoint)
            draining = asyncio.create_task(endpoint.generation.drain(CALL_S))
            await asyncio.sleep(0)
            assert await refused_request(endpoint) == (
                Code.UNAVAILABLE,
                "the server is shutting down",
            )
            endpoint.worker.put(submit, ids("done"), LENGTH)
            assert (await finished(call)).text == "done"
            await draining

    within_deadline(check())


def test_drain_fails_what_takes_too_long(tmp_path: Path) -> None:
    async def check() -> None:
        async with running_endpoint(tmp_path) as endpoint:
            call, submit = await begin(endpoint)
            await endpoint.generation.drain(0)
            assert await refused(call) == (
                Code.UNAVAILABLE,
                "the server shut down before the request was done",
            )
            assert await endpoint.worker.aborts.get() == submit.request_id

    within_deadline(check())


def test_a_client_that_does_not_listen_holds_up_no_shutdown(tmp_path: Path) -> None:
    async def check() -> None:
        async with running_endpoint(tmp_path) as endpoint:
            _call, submit = await begin(endpoint)
            await flood(endpoint, submit)
            await endpoint.generation.drain(0)
            await endpoint.server.stop(0)
            assert await endpoint.worker.aborts.get() == submit.request_id

    within_deadline(check())


def test_drain_of_nothing(tmp_path: Path) -> None:
    async def check() -> None:
        async with running_endpoint(tmp_path) as endpoint:
            await endpoint.generation.drain(0)

    within_deadline(check())
