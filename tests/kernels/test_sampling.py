import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from janus_kernels.sampling import filtered_probs, greedy, sample, top_logprobs


def test_filters_by_hand() -> None:
    logits_V = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    probs, ids = filtered_probs(logits_V, temperature=1.0, top_k=3, top_p=0.5, min_p=0.0)
    # Of 4/9, 3/9, 2/9 the first two reach one half.
    assert ids.tolist() == [1, 3]
    torch.testing.assert_close(probs, torch.tensor([4 / 7, 3 / 7]))
    probs, ids = filtered_probs(logits_V, temperature=1.0, top_k=0, top_p=1.0, min_p=0.6)
    assert ids.tolist() == [1, 3]


@pytest.mark.parametrize(("uniform", "expected"), [(0.0, 7), (0.24, 7), (0.25, 5), (0.999, 5)])
def test_sample_inverts_the_cumulative_distribution(uniform: float, expected: int) -> None:
    assert sample(torch.tensor([0.25, 0.75]), torch.tensor([7, 5]), uniform) == expected


def test_sample_never_takes_a_token_of_probability_0() -> None:
    almost_1 = torch.tensor([0.5, 0.4999, 0.0])
    assert sample(almost_1, torch.tensor([7, 5, 3]), 1 - 2**-53) == 5


def test_greedy_takes_the_lowest_id_of_a_tie() -> None:
    ids_B, best_B = greedy(torch.tensor([[1.0, 3.0, 3.0]]))
    assert ids_B.tolist() == [1]
    assert best_B.tolist() == [3.0]


def test_greedy_says_which_rows_hold_no_choice() -> None:
    nan, inf = float("nan"), float("inf")
    rows = [[0.0, nan, 1.0], [0.0, inf, 1.0], [-inf, -inf, -inf], [0.0, -inf, 1.0]]
    _, best_B = greedy(torch.tensor(rows))
    assert best_B.isfinite().tolist() == [False, False, False, True]


@settings(derandomize=True, max_examples=100, deadline=None)
@given(
    temperature=st.sampled_from([1e-45, 1e-38, 1e-30, 1e-20, 1e-7]),
    top_k=st.sampled_from([0, 1, 5]),
    top_p=st.sampled_from([1e-30, 0.5, 1.0]),
    min_p=st.sampled_from([0.0, 1e-30, 1.0]),
    scale=st.sampled_from([1e-3, 1.0, 1e30]),
    seed=st.integers(0, 1000),
)
def test_a_temperature_towards_0_is_greedy(
    temperature: float, top_k: int, top_p: float, min_p: float, scale: float, seed: int
) -> None:
    logits_V = scale * torch.randn(50, generator=torch.Generator().manual_seed(seed))
    probs, ids = filtered_probs(
        logits_V, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    for uniform in (0.0, 0.5, 1 - 2**-53):
        assert sample(probs, ids, uniform) == int(logits_V.argmax())


@settings(derandomize=True, max_examples=100, deadline=None)
@given(
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 5, 49, 50, 60]),
    top_p=st.sampled_from([0.01, 0.5, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.9, 1.0]),
    seed=st.integers(0, 1000),
)
def test_equals_the_warpers_of_transformers(
    temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    logits_V = 3 * torch.randn(50, generator=torch.Generator().manual_seed(seed))
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    expected_V = warpers(torch.zeros(1, 1, dtype=torch.long), logits_V[None])[0].softmax(-1)
    probs, ids = filtered_probs(
        logits_V, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    ours_V = torch.zeros(50).index_put((ids,), probs)
    torch.testing.assert_close(ours_V, expected_V, rtol=1e-4, atol=1e-6)


def test_top_logprobs() -> None:
    logprob, ids, values = top_logprobs(torch.tensor([0.1, 0.6, 0.3]).log(), 0, 2)
    assert logprob == pytest.approx(torch.tensor(0.1).log().item())
    assert ids == [1, 2]
    assert values == pytest.approx(torch.tensor([0.6, 0.3]).log().tolist())
    assert top_logprobs(torch.tensor([0.5, 0.2, 0.3]).log(), 0, 0)[1:] == ([], [])


@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_of_equally_likely_tokens_the_greedy_one_comes_first(count: int) -> None:
    logits_V = torch.zeros(500)
    logits_V[[7, 3, 490, 250]] = 2.0
    _, ids, values = top_logprobs(logits_V, 3, count)
    assert ids == [3, 7, 250, 490, *range(0, 3), 4, 5, 6, *range(8, 18)][:count]
    assert ids[0] == int(greedy(logits_V[None])[0])
    assert values == sorted(values, reverse=True)
