"""Choose the next tokens of a step.

A choice depends on the sequence's own logits and parameters and on (seed, position): never on the
batch, so that a request that is resumed elsewhere goes on as it would have.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from janus_kernels.sampling import filtered_probs, greedy, sample, top_logprobs
from janus_scheduler.request import SamplingParams

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingFault:
    """Why no token could be chosen for one sequence."""

    reason: str


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that (seed, position) alone decide: the Philox counter generator."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def sample_tokens(
    logits_BV: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]
) -> list[TokenChoice | SamplingFault]:
    """Choose one token for each row; `positions` are those the chosen tokens will take.

    What goes wrong with a row is that row's fault, and the others get their tokens.
    """
    ids_B, best_B = greedy(logits_BV)
    choices: list[TokenChoice | SamplingFault] = []
    best = zip(ids_B.tolist(), best_B.isfinite().tolist(), strict=True)
    for row, (best_id, is_finite) in enumerate(best):
        if not is_finite:
            choices.append(SamplingFault(reason="the model computed logits that are not finite"))
            continue
        try:
            choices.append(_choose(logits_BV[row], best_id, params[row], positions[row]))
        except Exception:
            logger.exception("cannot choose a token with %s", params[row])
            choices.append(SamplingFault(reason="no token could be chosen; the log says why"))
    return choices


def _choose(
    logits_V: torch.Tensor, best_id: int, params: SamplingParams, position: int
) -> TokenChoice:
    chosen = best_id
    if params.temperature > 0.0:
        probs, ids = filtered_probs(
            logits_V,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
        )
        chosen = sample(probs, ids, uniform(params.seed, position))
    logprobs = None
    if params.num_logprobs is not None:
        logprob, top_ids, top = top_logprobs(logits_V, chosen, params.num_logprobs)
        logprobs = Logprobs(chosen=logprob, top_ids=tuple(top_ids), top=tuple(top))
    return TokenChoice(token_id=chosen, logprobs=logprobs)
