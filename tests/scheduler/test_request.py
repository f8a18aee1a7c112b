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
