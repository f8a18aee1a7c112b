"""What recorded routing says about a placement: counts, co-activation, expected a_max.

Shapes: N recorded tokens, K experts of a token, E logical experts, W expert workers, B batches.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from janus_scheduler.activation import activated
from janus_scheduler.placement import LayerReplicas

ExpertIds = npt.NDArray[np.integer]
"""[N, K]: the distinct experts of each token of one layer."""

_CHUNK_TOKENS = 2**14
"""Spread over all experts at once; long traces would fill the memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpectedLoad:
    """How a placement of one layer does under the `exact` schedule, over sampled batches."""

    a_max: float
    """Mean of the most experts read by one worker."""
    a_max_p99: float
    """Its 99th percentile."""
    floor: float
    """Mean of the least a_max that any placement could have: activated experts spread evenly."""
    imbalance: float
    """Tokens of the busiest worker over the mean, if the replicas of an expert shared evenly."""


def expert_counts(ids_NK: ExpertIds, num_experts: int) -> npt.NDArray[np.int64]:
    """Tokens of each expert, [E]."""
    return np.bincount(ids_NK.ravel(), minlength=num_experts)


def coactivation(ids_NK: ExpertIds, num_experts: int) -> npt.NDArray[np.int64]:
    """Tokens that chose both experts, [E, E]; 0 on the diagonal."""
    both_EE = np.zeros((num_experts, num_experts), dtype=np.int64)
    for start in range(0, len(ids_NK), _CHUNK_TOKENS):
        part_NK = ids_NK[start : start + _CHUNK_TOKENS].astype(np.int64)
        # NumPy multiplies integer matrices slowly; float32 is exact for so few tokens.
        chosen_NE = np.zeros((len(part_NK), num_experts), dtype=np.float32)
        np.put_along_axis(chosen_NE, part_NK, 1.0, axis=1)
        both_EE += np.rint(chosen_NE.T @ chosen_NE).astype(np.int64)
    np.fill_diagonal(both_EE, 0)
    return both_EE


def sample_batches(
    ids_NK: ExpertIds, num_experts: int, *, num_tokens: int, num_batches: int, seed: int
) -> npt.NDArray[np.bool_]:
    """Which experts each of `num_batches` made-up batches activates, [B, E].

    A batch has `num_tokens` tokens from all over the trace: a decode batch holds one token of each
    of many requests, not neighbours of one text.
    """
    rng = np.random.default_rng(seed)
    active_BE = np.zeros((num_batches, num_experts), dtype=bool)
    for active_E in active_BE:
        replace = num_tokens > len(ids_NK)
        active_E[ids_NK[rng.choice(len(ids_NK), num_tokens, replace=replace)].ravel()] = True
    return active_BE


def expected_load(
    active_BE: npt.NDArray[np.bool_],
    counts_E: npt.NDArray[np.int64],
    replicas: LayerReplicas,
) -> ExpectedLoad:
    """Judge one layer's replicas by batches from `sample_batches` and each expert's tokens."""
    experts_BW, _ = activated(active_BE, replicas)
    a_max_B = experts_BW.max(axis=1)
    # In thousandths of a token, as an even share of an expert's tokens is seldom a whole number.
    tokens_W = replicas.per_worker(
        np.broadcast_to(
            (counts_E * 1000 // replicas.num_replicas_E)[:, None], replicas.slots_ER.shape
        )
    )
    return ExpectedLoad(
        a_max=float(a_max_B.mean()),
        a_max_p99=float(np.percentile(a_max_B, 99)),
        floor=float((-(-active_BE.sum(axis=1) // replicas.num_workers)).mean()),
        imbalance=float(tokens_W.max() / max(tokens_W.mean(), 1e-9)),
    )
