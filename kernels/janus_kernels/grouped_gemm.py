"""Expert feed-forward over ragged groups: the tokens of each activated expert slot together.

Shapes: T tokens, H hidden, F expert intermediate, K experts of a token, C expert slots of a worker,
P token-expert pairs that this worker computes (P <= T*K). Slots are numbered over all workers.

Weights are read where they lie, once for each activated slot: gathering them per token costs ten
times the product itself.
"""

from collections.abc import Sequence

import torch

from janus_kernels.linear import linear, padded_size


def expert_ffn(
    x_TH: torch.Tensor,
    slots_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    tokens_C: torch.Tensor,
    gate_up_CHF: Sequence[torch.Tensor],
    down_CFH: Sequence[torch.Tensor],
    *,
    first_slot: int,
) -> torch.Tensor:
    """Weighted sum of the outputs of this worker's experts for each token.

    slots_TK (integers): expert slot of each pair, this worker's or another's; this worker's are the
    C from `first_slot` on, and tokens_C (integers) says how many pairs each of them has.
    gate_up_CHF[c] packs [2F, H] (gate rows, then up rows), down_CFH[c] packs [H, F], both by
    `pack_weight`. Each expert computes down(silu(gate(x)) * up(x)).
    Returns partial_TH (fp32, zero for tokens without a pair here).
    """
    partial_TH = torch.zeros(x_TH.shape, dtype=torch.float32, device=x_TH.device)
    counts = tokens_C.tolist()
    if not any(counts):
        return partial_TH
    # Pairs in the order of their slots, those of the workers before and after left out.
    slots_P = slots_TK.flatten()
    num_before = int((slots_P < first_slot).sum())
    order_P = slots_P.argsort(stable=True)[num_before : num_before + sum(counts)]
    tokens_P = order_P // slots_TK.shape[1]
    scale_P = weights_TK.flatten().index_select(0, order_P)
    gate_PF, up_PF = _per_slot(x_TH.index_select(0, tokens_P), counts, gate_up_CHF).chunk(2, dim=-1)
    # Scaled before the projection, where a row is shorter than after it; the result is the same.
    inner_PF = torch.nn.functional.silu(gate_PF).mul_(up_PF).mul_(scale_P.unsqueeze(1))
    out_PH = _per_slot(inner_PF, counts, down_CFH)
    partial_TH.index_add_(0, tokens_P, out_PH.float())
    return partial_TH


def _per_slot(
    x_PI: torch.Tensor, counts: Sequence[int], weights: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Apply each slot's weight to its run of consecutive rows."""
    outputs: list[torch.Tensor] = []
    first = 0
    for count, weight in zip(counts, weights, strict=True):
        if count:
            # Rows of the next slots are the padding that `linear` would copy.
            group = x_PI[first : first + padded_size(count)]
            outputs.append(linear(group, weight)[:count])
            first += count
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
