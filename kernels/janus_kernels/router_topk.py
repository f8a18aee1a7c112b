"""Softmax gate: logits to the chosen experts of each token and their weights.

Shapes: T tokens, E logical experts, K experts of a token.

Example: logits [0, ln 3], K=1: probabilities [1/4, 3/4], topk_ids [1], weight 3/4 (1 normalised).
"""

import torch


def router_topk(
    logits_TE: torch.Tensor, top_k: int, *, normalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return topk_ids_TK (int64, most likely first) and topk_weights_TK (dtype of the logits).

    The softmax is taken in fp32 over all experts; `normalize` scales the chosen weights of a token
    to sum to 1.
    """
    weights_TK, ids_TK = torch.softmax(logits_TE, dim=-1, dtype=torch.float32).topk(top_k, dim=-1)
    if normalize:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return ids_TK, weights_TK.to(logits_TE.dtype)
