"""Requests: positions count through prompt and output alike."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from janus_scheduler.request import SamplingParams, Sequence


def sequence(prompt_ids: list[int], output_ids: list[int]) -> Sequence:
    return Sequence(
        request_id="r",
        prompt_ids=tuple(prompt_ids),
        params=SamplingParams(max_tokens=8),
        output_ids=output_ids,
    )


def test_tokens_by_hand() -> None:
    request = sequence([10, 11, 12], [20, 21])
    assert request.num_tokens == 5
    assert request.tokens(0, 2) == [10, 11]
    assert request.tokens(2, 4) == [12, 20]
    assert request.tokens(4, 5) == [21]
    assert request.tokens(3, 3) == []


@settings(derandomize=True, deadline=None)
@given(
    st.lists(st.integers(0, 9), max_size=6),
    st.lists(st.integers(0, 9), max_size=6),
    st.integers(0, 12),
    st.integers(0, 12),
)
def test_tokens_are_a_slice_of_prompt_plus_output(
    prompt_ids: list[int], output_ids: list[int], start: int, stop: int
) -> None:
    request = sequence(prompt_ids, output_ids)
    assert request.tokens(start, stop) == (prompt_ids + output_ids)[start:stop]
    assert request.num_tokens == len(prompt_ids + output_ids)


def test_params_never_change() -> None:
    params = SamplingParams(max_tokens=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.max_tokens = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", value) for value in (-0.1, 100.1, float("inf"), float("nan"))),
        *(("top_k", value) for value in (-1, 2**31)),
        *(("top_p", value) for value in (-0.1, 0.0, 1.1, float("nan"))),
        *(("min_p", value) for value in (-0.1, 1.1, float("nan"))),
        *(("seed", value) for value in (-1, 2**63)),
        *(("num_logprobs", value) for value in (-1, 21)),
        *(("max_tokens", value) for value in (-1, 0)),
    ],
)
def test_sampling_parameters_out_of_bounds(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field.removeprefix('num_')} is "):
        SamplingParams(**{"max_tokens": 1, field: value})


def test_sampling_parameters_at_their_bounds() -> None:
    for field, values in {
        "temperature": (0, 100),
        "top_k": (0, 2**31 - 1),
        "top_p": (1e-9, 1),
        "min_p": (0, 1),
        "seed": (0, 2**63 - 1),
        "num_logprobs": (None, 0, 20),
    }.items():
        for value in values:
            SamplingParams(**{"max_tokens": 1, field: value})
