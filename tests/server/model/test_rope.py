"""Frequencies of the rotary embedding, worked by hand and against those of transformers."""

import math
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3MoeConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from janus_scheduler.model_spec import Llama3Scaling, RopeSpec, YarnScaling
from janus_server.model.rope import inverse_frequencies
from janus_server.model.rope_config import rope_spec

MAX_CONTEXT = 4096


def floats(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False)


COMMON = {
    "rope_theta": floats(2, 1e7),
    "factor": floats(1, 64),
    "original_max_position_embeddings": st.integers(16, MAX_CONTEXT),
}
LINEAR = st.fixed_dictionaries({"rope_type": st.just("linear"), **COMMON})
YARN = st.fixed_dictionaries(
    {"rope_type": st.just("yarn"), **COMMON},
    optional={
        "beta_fast": floats(0.5, 64),
        "beta_slow": floats(0.5, 64),
        "truncate": st.booleans(),
        "attention_factor": floats(0, 4),
        "mscale": floats(0, 2),
        "mscale_all_dim": floats(0, 2),
    },
)
LLAMA3 = st.fixed_dictionaries(
    {
        "rope_type": st.just("llama3"),
        **COMMON,
        "low_freq_factor": floats(0.25, 1),
        "high_freq_factor": floats(2, 8),
    }
)


@settings(max_examples=200, deadline=None)
@given(rope=LINEAR | YARN | LLAMA3, head_dim=st.integers(1, 64).map(lambda half: 2 * half))
def test_frequencies_and_factor_are_those_of_transformers(
    rope: dict[str, Any], head_dim: int
) -> None:
    spec = rope_spec({"rope_parameters": rope}, head_dim=head_dim, max_context=MAX_CONTEXT)
    config = Qwen3MoeConfig(
        head_dim=head_dim, max_position_embeddings=MAX_CONTEXT, rope_parameters=dict(rope)
    )
    theirs, attention_factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    ours = inverse_frequencies(spec, head_dim)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert math.isclose(spec.attention_factor, attention_factor, rel_tol=1e-12)


def test_linear_by_hand() -> None:
    rope = RopeSpec(theta=100.0, factor=4.0)
    torch.testing.assert_close(inverse_frequencies(rope, 4), torch.tensor([0.25, 0.025]))


def test_llama3_by_hand() -> None:
    # Wavelengths 2 pi * (1, 10, 100, 1000); below 250 kept, above 1000 divided, between in part.
    scaling = Llama3Scaling(original_context=1000, low_freq_factor=1.0, high_freq_factor=4.0)
    rope = RopeSpec(theta=1e4, factor=8.0, scaling=scaling)
    smooth = (1000 / (200 * math.pi) - 1) / 3
    expected = torch.tensor([1, 0.1, 0.01 * (smooth + (1 - smooth) / 8), 0.001 / 8])
    torch.testing.assert_close(inverse_frequencies(rope, 8), expected)


def test_yarn_by_hand() -> None:
    # 2000 pi positions: pair i turns 1000 / 10**i times, so 100 and 1 turn bound pairs 1 and 3.
    scaling = YarnScaling(
        original_context=round(2000 * math.pi), beta_fast=100.0, beta_slow=1.0, truncate=False
    )
    rope = RopeSpec(theta=1e4, factor=2.0, scaling=scaling)
    expected = torch.tensor([1, 0.1, 0.01 * 0.75, 0.001 * 0.5])
    torch.testing.assert_close(inverse_frequencies(rope, 8), expected, rtol=1e-4, atol=0)
