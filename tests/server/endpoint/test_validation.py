import math
from typing import Any

import pytest

from janus_proto.v1.inference_pb2 import SamplingParams
from janus_server.endpoint import validation
from janus_server.endpoint.validation import Bounds
from janus_server.errors import InvalidRequestError

BOUNDS = Bounds(vocab_size=256, max_context=64, eos_token_ids=(0, 9), has_tokenizer=True)
TEXTLESS = Bounds(vocab_size=8, max_context=64, eos_token_ids=(), has_tokenizer=False)


def complaint(**sampling: Any) -> str:
    with pytest.raises(InvalidRequestError) as raised:
        validation.check_sampling(SamplingParams(**sampling), BOUNDS)
    sentence = str(raised.value)
    assert "\n" not in sentence
    assert len(sentence) < 200
    return sentence


def complete(num_prompt_tokens: int = 4, seed: int = 5, **sampling: Any) -> SamplingParams:
    return validation.complete_sampling(
        SamplingParams(**sampling), num_prompt_tokens=num_prompt_tokens, bounds=BOUNDS, seed=seed
    )


def test_unset_fields_pass() -> None:
    validation.check_sampling(SamplingParams(), BOUNDS)
    validation.check_sampling(SamplingParams(), TEXTLESS)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [0.0, 1e-30, 1.0, 100.0]),
        ("top_k", [0, 1, 256, 257, 2**31 - 1]),
        ("top_p", [1e-30, 0.5, 1.0]),
        ("min_p", [0.0, 0.5, 1.0]),
        ("seed", [0, 1, 2**63 - 1]),
        ("max_tokens", [1, 64]),
        ("logprobs", [0, 1, 20]),
        ("stop", [["x"], ["x" * 256], ["é"] * 16]),
        ("stop_token_ids", [[], [0, 255], [7] * 64]),
        ("ignore_eos", [True, False]),
    ],
)
def test_values_within_bounds(field: str, values: list[Any]) -> None:
    for value in values:
        validation.check_sampling(SamplingParams(**{field: value}), BOUNDS)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("temperature", -0.5, "temperature is -0.5; it must be from 0 to 100"),
        ("temperature", 100.5, "temperature is 100.5; it must be from 0 to 100"),
        ("temperature", 200.1, "temperature is 200.10001; it must be from 0 to 100"),
        ("temperature", -1e-30, "temperature is -1e-30; it must be from 0 to 100"),
        ("top_k", -1, "top_k is -1; it must be from 0 to 2147483647"),
        ("top_p", -0.1, "top_p is -0.1; it must be from 0 to 1"),
        ("top_p", 1.1, "top_p is 1.1; it must be from 0 to 1"),
        ("top_p", 0.0, "top_p is 0, which leaves no token; use temperature 0"),
        ("min_p", -0.1, "min_p is -0.1; it must be from 0 to 1"),
        ("min_p", 1.1, "min_p is 1.1; it must be from 0 to 1"),
        ("seed", -1, "seed is -1; it must be from 0 to 9223372036854775807"),
        ("max_tokens", -1, "max_tokens is -1; it must be from 1 to 64"),
        ("max_tokens", 0, "max_tokens is 0; it must be from 1 to 64"),
        ("max_tokens", 65, "max_tokens is 65; it must be from 1 to 64"),
        ("max_tokens", 1234567, "max_tokens is 1234567; it must be from 1 to 64"),
        ("logprobs", -1, "logprobs is -1; it must be from 0 to 20"),
        ("logprobs", 21, "logprobs is 21; it must be from 0 to 20"),
        ("stop", ["x"] * 17, "stop has 17 strings; up to 16 are allowed"),
        ("stop", ["x", ""], "a stop string has 0 characters; 1 to 256 are allowed"),
        ("stop", ["x" * 257], "a stop string has 257 characters; 1 to 256 are allowed"),
        ("stop_token_ids", [1] * 65, "stop_token_ids has 65 ids; up to 64 are allowed"),
        (
            "stop_token_ids",
            [1, 256],
            "stop_token_ids has the token id 256; the vocabulary ends at 255",
        ),
    ],
)
def test_values_out_of_bounds(field: str, value: Any, sentence: str) -> None:
    assert complaint(**{field: value}) == sentence


@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number(field: str, value: float) -> None:
    assert complaint(**{field: value}).startswith(f"{field} is {value}; it must be from 0 to ")


def test_logprobs_of_a_tiny_vocabulary() -> None:
    validation.check_sampling(SamplingParams(logprobs=8), TEXTLESS)
    with pytest.raises(InvalidRequestError, match="logprobs is 9; it must be from 0 to 8"):
        validation.check_sampling(SamplingParams(logprobs=9), TEXTLESS)


def test_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(InvalidRequestError, match=r"tokenizer\.json: use stop_token_ids"):
        validation.check_sampling(SamplingParams(stop=["x"]), TEXTLESS)


@pytest.mark.parametrize("request_id", ["a", "a" * 128, "job-7/part_1:x.y"])
def test_request_ids(request_id: str) -> None:
    validation.check_request_id(request_id)


@pytest.mark.parametrize(
    "request_id", ["", "a" * 129, "a" * 10**6, "a b", "a\nb", "é", "x#1", "a\n"]
)
def test_request_ids_that_would_garble_a_log(request_id: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        validation.check_request_id(request_id)
    sentence = str(raised.value)
    assert sentence.startswith(f"request_id {request_id[:128]!a} of {len(request_id)} ")
    assert sentence.endswith("must be 1 to 128 letters, digits or ._:/-")
    assert "\n" not in sentence
    assert len(sentence) < 300


def test_text() -> None:
    validation.check_text("", BOUNDS)
    validation.check_text("é" * 8 * 64, BOUNDS)
    with pytest.raises(InvalidRequestError, match=r"the prompt has 1026 bytes of UTF-8; .* 1024"):
        validation.check_text("é" * (8 * 64 + 1), BOUNDS)
    with pytest.raises(InvalidRequestError, match="send token ids, not text"):
        validation.check_text("x", TEXTLESS)


def test_prompts() -> None:
    validation.check_prompt([0], BOUNDS)
    validation.check_prompt([255] * 63, BOUNDS)
    with pytest.raises(InvalidRequestError, match="the prompt is empty"):
        validation.check_prompt([], BOUNDS)
    with pytest.raises(InvalidRequestError, match=r"the prompt has 64 tokens; .* up to 63"):
        validation.check_prompt([1] * 64, BOUNDS)
    with pytest.raises(
        InvalidRequestError, match="the prompt has the token id 256; the vocabulary ends at 255"
    ):
        validation.check_prompt([1, 256, 2], BOUNDS)


def test_defaults_are_filled_in() -> None:
    params = complete()
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (1.0, 0, 1.0, 0.0)
    assert (params.seed, params.max_tokens) == (5, 60)
    assert list(params.stop_token_ids) == [0, 9]
    assert not params.HasField("logprobs")
    for field in ("temperature", "top_k", "top_p", "min_p", "seed", "max_tokens"):
        assert params.HasField(field)


def test_what_was_set_stays() -> None:
    params = complete(
        temperature=0.0,
        top_k=3,
        top_p=0.5,
        min_p=0.25,
        seed=0,
        max_tokens=60,
        stop=["x"],
        stop_token_ids=[7],
        ignore_eos=True,
        logprobs=0,
    )
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.0, 3, 0.5, 0.25)
    assert (params.seed, params.max_tokens) == (0, 60)
    assert (list(params.stop), list(params.stop_token_ids)) == (["x"], [7])
    assert params.HasField("logprobs")


def test_max_tokens_beyond_the_context_is_refused() -> None:
    assert complete(num_prompt_tokens=63).max_tokens == 1
    with pytest.raises(InvalidRequestError) as raised:
        complete(max_tokens=61)
    assert str(raised.value) == (
        "max_tokens is 61, but a prompt of 4 tokens leaves 60 of the 64 tokens of the context"
    )
