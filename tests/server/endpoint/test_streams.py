import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from janus_proto.v1 import inference_pb2, worker_pb2
from janus_server.endpoint.streams import (
    MAX_DELTA_TOKENS,
    MAX_PENDING_TOKENS,
    Delta,
    RequestStream,
    TextAssembler,
)
from janus_server.endpoint.tokenizer import Detokenizer
from janus_server.errors import StalledClientError, UnavailableError
from tests.fakes.endpoint import BYTES, ids, within_deadline

STOP = inference_pb2.FINISH_REASON_STOP
LENGTH = inference_pb2.FINISH_REASON_LENGTH
ABORT = inference_pb2.FINISH_REASON_ABORT
GOING_ON = inference_pb2.FINISH_REASON_UNSPECIFIED


def output(token_ids: Sequence[int], finish_reason: int = GOING_ON) -> worker_pb2.SequenceOutput:
    logprobs = [inference_pb2.TokenLogprobs(logprob=-token_id) for token_id in token_ids]
    return worker_pb2.SequenceOutput(
        token_ids=token_ids, logprobs=logprobs, finish_reason=finish_reason
    )


def assembler(stop: Sequence[str] = (), stop_token_ids: Sequence[int] = ()) -> TextAssembler:
    sampling = inference_pb2.SamplingParams(stop=stop, stop_token_ids=stop_token_ids)
    return TextAssembler(Detokenizer(BYTES), sampling)


def delta(text: str, finish_reason: int = GOING_ON) -> Delta:
    return Delta(token_ids=ids(text), finish_reason=finish_reason)


def test_outputs_merge_until_they_are_taken() -> None:
    async def check() -> None:
        stream = RequestStream("r")
        stream.put(output([1]))
        assert (await stream.take()).token_ids == [1]
        stream.put(output([2]))
        stream.put(output([3, 4], LENGTH))
        merged = await stream.take()
        assert (merged.token_ids, merged.finish_reason) == ([2, 3, 4], LENGTH)
        assert [token.logprob for token in merged.logprobs] == [-2, -3, -4]

    within_deadline(check())


@given(st.lists(st.integers(0, 3 * MAX_DELTA_TOKENS), min_size=1, max_size=4))
def test_what_is_taken_comes_in_small_parts_of_all_that_was_put(sizes: list[int]) -> None:
    async def check() -> None:
        stream = RequestStream("r")
        token_ids = list(range(sum(sizes)))
        for index, size in enumerate(sizes):
            start = sum(sizes[:index])
            is_last = index + 1 == len(sizes)
            stream.put(output(token_ids[start : start + size], LENGTH if is_last else GOING_ON))
        deltas = [await stream.take()]
        while not deltas[-1].finish_reason:
            deltas.append(await stream.take())
        assert [token for delta in deltas for token in delta.token_ids] == token_ids
        for delta in deltas:
            assert len(delta.token_ids) <= MAX_DELTA_TOKENS
            assert [-entry.logprob for entry in delta.logprobs] == delta.token_ids

    within_deadline(check())


def test_take_waits_for_something_new() -> None:
    async def check() -> None:
        stream = RequestStream("r")
        taking = asyncio.create_task(stream.take())
        await asyncio.sleep(0)
        assert not taking.done()
        stream.put(output([7]))
        assert (await taking).token_ids == [7]

    within_deadline(check())


def test_a_take_that_waits_learns_of_an_abort_and_of_a_failure() -> None:
    async def check() -> None:
        aborted, failed = RequestStream("a"), RequestStream("f")
        takes = [asyncio.create_task(stream.take()) for stream in (aborted, failed)]
        await asyncio.sleep(0)
        aborted.abort()
        failed.fail(UnavailableError("gone"))
        assert (await takes[0]).finish_reason == ABORT
        with pytest.raises(UnavailableError, match="gone"):
            await takes[1]

    within_deadline(check())


def test_a_client_that_is_far_behind_is_given_up() -> None:
    async def check() -> None:
        stream = RequestStream("r")
        stream.put(output([1] * MAX_PENDING_TOKENS))
        await stream.take()
        stream.put(output([1] * (MAX_DELTA_TOKENS + 1), LENGTH))
        with pytest.raises(StalledClientError, match="8192 tokens behind"):
            await stream.take()

    within_deadline(check())


def test_abort_keeps_what_has_come_and_nothing_after() -> None:
    async def check() -> None:
        stream = RequestStream("r")
        stream.put(output([1]))
        assert not stream.is_over
        stream.abort()
        assert stream.is_over
        stream.put(output([2]))
        stream.fail(UnavailableError("late"))
        merged = await stream.take()
        assert (merged.token_ids, merged.finish_reason) == ([1], ABORT)

    within_deadline(check())


def test_a_finished_request_stays_as_it_finished() -> None:
    async def check() -> None:
        stream = RequestStream("r")
        stream.put(output([1], STOP))
        stream.abort()
        assert (await stream.take()).finish_reason == STOP

    within_deadline(check())


def test_a_failure_is_raised_by_every_take() -> None:
    async def check() -> None:
        stream = RequestStream("r")
        stream.fail(UnavailableError("gone"))
        stream.abort()
        for _ in range(2):
            with pytest.raises(UnavailableError, match="gone"):
                await stream.take()

    within_deadline(check())


def test_the_worker_never_sees_an_id_twice() -> None:
    first, second = RequestStream("r"), RequestStream("r")
    assert first.worker_request_id != second.worker_request_id
    assert first.worker_request_id.startswith("r#")


def test_text_follows_the_tokens() -> None:
    text = assembler()
    assert text.add(delta("Hel")) == ("Hel", 3)
    assert text.add(delta("lo", LENGTH)) == ("lo", 2)
    assert text.matched_stop == ""


def test_half_a_character_waits_and_is_shown_broken_at_the_end() -> None:
    text = assembler()
    octopus = ids("🐙")
    assert text.add(Delta(token_ids=octopus[:2])) == ("", 2)
    assert text.add(Delta(token_ids=octopus[2:])) == ("🐙", 2)
    assert text.add(Delta(token_ids=octopus[:1], finish_reason=LENGTH)) == ("\ufffd", 1)


def test_tokens_behind_a_stop_string_do_not_count() -> None:
    text = assembler(stop=["\n\n"])
    assert text.add(delta("one\n")) == ("one", 4)
    assert text.add(delta("\ntwo", LENGTH)) == ("", 1)
    assert text.matched_stop == "\n\n"


def test_what_was_held_back_for_a_stop_string_comes_at_the_end() -> None:
    text = assembler(stop=["END"])
    assert text.add(delta("the EN")) == ("the ", 6)
    assert text.add(Delta(finish_reason=LENGTH)) == ("EN", 0)
    assert text.matched_stop == ""


def test_a_broken_character_can_complete_a_stop_string() -> None:
    text = assembler(stop=["\ufffd"])
    assert text.add(Delta(token_ids=ids("a🐙")[:2], finish_reason=LENGTH)) == ("a", 2)
    assert text.matched_stop == "\ufffd"


def test_an_end_token_has_an_id_but_no_text() -> None:
    end = ids("!")
    text = assembler(stop=["!"], stop_token_ids=end)
    assert text.add(delta("bye!", STOP)) == ("bye", 4)
    assert text.matched_stop == ""


def test_an_end_token_alone() -> None:
    text = assembler(stop=["ab"], stop_token_ids=ids("!"))
    assert text.add(delta("xa")) == ("x", 2)
    assert text.add(delta("!", STOP)) == ("a", 1)


def test_without_a_tokenizer_there_is_no_text() -> None:
    text = TextAssembler(None, inference_pb2.SamplingParams())
    assert text.add(Delta(token_ids=[1, 2], finish_reason=LENGTH)) == ("", 2)
