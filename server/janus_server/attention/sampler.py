"""Choose the next tokens of a step.

A choice depends on the sequence's own logits and parameters and on (seed, position): never on the
batch, so that a request that is resumed elsewhere goes on as it would have.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from janus_kernels.sampling import filtered_probs, greedy, sample, top_logprobs
from janus_scheduler.request import SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class Logprobs:
    """Natural log-probabilities at one generated position, before temperature and filters."""

    chosen: float
    top_ids: tuple[int, ...]
    """Most likely first."""
    top: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenChoice:
    """The token chosen for one sequence."""

    token_id: int
    logprobs: Logprobs | None


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that (seed, position) alone decide: the Philox counter generator."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def sample_tokens(
    logits_BV: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]
) -> list[TokenChoice]:
    """Choose one token for each row; `positions` are those the chosen tokens will take."""
    chosen_B = greedy(logits_BV)
    for row, (one, position) in enumerate(zip(params, positions, strict=True)):
        if one.temperature > 0.0:
            probs, ids = filtered_probs(
                logits_BV[row],
                temperature=one.temperature,
                top_k=one.top_k,
                top_p=one.top_p,
                min_p=one.min_p,
            )
            chosen_B[row] = sample(probs, ids, uniform(one.seed, position))
    logprobs = _logprobs(logits_BV, chosen_B, params)
    return [
        TokenChoice(token_id=token_id, logprobs=logprobs.get(row))
        for row, token_id in enumerate(chosen_B.tolist())
    ]


def _logprobs(
    logits_BV: torch.Tensor, chosen_B: torch.Tensor, params: Sequence[SamplingParams]
) -> dict[int, Logprobs]:
    asked = [row for row, one in enumerate(params) if one.num_logprobs is not None]
    if not asked:
        return {}
    counts = [params[row].num_logprobs or 0 for row in asked]
    results = top_logprobs(logits_BV[asked], chosen_B[asked], counts)
    return {
        row: Logprobs(chosen=chosen, top_ids=tuple(ids), top=tuple(values))
        for row, (chosen, ids, values) in zip(asked, results, strict=True)
    }
