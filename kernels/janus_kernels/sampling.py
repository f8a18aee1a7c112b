"""Choose the next token of each sequence from its logits.

Shapes: B sequences, V vocabulary. A choice depends on the sequence's logits, its parameters and one
uniform number alone, never on the other sequences of the batch.
"""

from collections.abc import Sequence

import torch


def greedy(logits_BV: torch.Tensor) -> torch.Tensor:
    """The most likely token of each sequence, int64 [B]; the lowest id wins a tie."""
    return logits_BV.argmax(dim=-1)


def filtered_probs(
    logits_V: torch.Tensor, *, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities that remain after the filters, best first, and the ids they belong to.

    In the order of `transformers`: temperature (> 0), top_k (0: off), top_p (1: off), min_p (0:
    off), each on what the one before left, renormalised. At least one token remains.
    """
    scaled = (logits_V.float() / temperature).sort(descending=True, stable=True)
    values, ids = scaled.values, scaled.indices
    if 0 < top_k < values.shape[0]:
        # Ties with the k-th stay, as they do in the reference.
        keep = int((values >= values[top_k - 1]).sum())
        values, ids = values[:keep], ids[:keep]
    probs = torch.softmax(values, dim=-1)
    if top_p < 1.0:
        before = probs.cumsum(-1) - probs
        keep = max(int((before < top_p).sum()), 1)
        probs, ids = probs[:keep] / probs[:keep].sum(), ids[:keep]
    if min_p > 0.0:
        keep = int((probs >= min_p * probs[0]).sum())
        probs, ids = probs[:keep] / probs[:keep].sum(), ids[:keep]
    return probs, ids


def sample(probs: torch.Tensor, ids: torch.Tensor, uniform: float) -> int:
    """Invert the cumulative distribution at `uniform` in [0, 1)."""
    place = int(torch.searchsorted(probs.double().cumsum(-1), uniform, right=True))
    return int(ids[min(place, ids.shape[0] - 1)])


def top_logprobs(
    logits_BV: torch.Tensor, chosen_B: torch.Tensor, counts: Sequence[int]
) -> list[tuple[float, list[int], list[float]]]:
    """For each sequence: log-probability of its token, ids and log-probabilities of the likeliest.

    Natural logarithms of the plain softmax, before temperature and filters; counts[b] likeliest.
    """
    logprobs_BV = torch.log_softmax(logits_BV.float(), dim=-1)
    chosen = logprobs_BV.gather(1, chosen_B.unsqueeze(1)).squeeze(1).tolist()
    values, ids = logprobs_BV.topk(max(counts), dim=-1)
    return [
        (chosen[b], ids[b, :count].tolist(), values[b, :count].tolist())
        for b, count in enumerate(counts)
    ]
