"""Choose the next token of each sequence from its logits.

Shapes: B sequences, V vocabulary. A choice depends on the sequence's logits, its parameters and one
uniform number alone, never on the other sequences of the batch.
"""

import torch

_MIN_TEMPERATURE = 1e-30
"""Below, 1 / temperature overflows a float32. The nearest two logits are further apart than this,
so that the distribution is that of the limit: all probability on the most likely token."""


def greedy(logits_BV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The most likely token of each sequence, int64 [B], and its logit, fp32 [B].

    The lowest id wins a tie. The logit is finite exactly where a token can be chosen: NaN anywhere
    in a row and +inf make it NaN or inf, and so do rows of -inf alone.
    """
    best = logits_BV.float().max(dim=-1)
    return best.indices, best.values


def filtered_probs(
    logits_V: torch.Tensor, *, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities that remain after the filters, best first, and the ids they belong to.

    In the order of `transformers`: temperature (> 0), top_k (0: off), top_p (1: off), min_p (0:
    off); each filter sees what the filter before it left, renormalised. At least one token remains.
    """
    ordered = logits_V.float().sort(descending=True, stable=True)
    # The best becomes 0 before the division, which then overflows only towards -inf.
    values = (ordered.values - ordered.values[0]) / max(temperature, _MIN_TEMPERATURE)
    ids = ordered.indices
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
        keep = max(int((probs >= min_p * probs[0]).sum()), 1)
        probs, ids = probs[:keep] / probs[:keep].sum(), ids[:keep]
    return probs, ids


def sample(probs: torch.Tensor, ids: torch.Tensor, uniform: float) -> int:
    """Invert the cumulative distribution at `uniform` in [0, 1)."""
    cumulative = probs.double().cumsum(-1)
    # Rounding leaves the sum beside 1; scaled to it, no token of probability 0 can be reached.
    place = torch.searchsorted(cumulative, uniform * float(cumulative[-1]), right=True)
    return int(ids[place])


def top_logprobs(
    logits_V: torch.Tensor, chosen: int, count: int
) -> tuple[float, list[int], list[float]]:
    """Log-probability of the chosen token; ids and log-probabilities of the `count` likeliest.

    Natural logarithms of the plain softmax, before temperature and filters; of equals the lowest
    id first, as `greedy` chooses.
    """
    logprobs_V = torch.log_softmax(logits_V.float(), dim=-1)
    if not count:
        return float(logprobs_V[chosen]), [], []
    # In the order of ids, which `topk` does not keep among equals.
    (ids,) = (logprobs_V >= logprobs_V.topk(count).values[-1]).nonzero(as_tuple=True)
    values, order = logprobs_V[ids].sort(descending=True, stable=True)
    return float(logprobs_V[chosen]), ids[order][:count].tolist(), values[:count].tolist()
