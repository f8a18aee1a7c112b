"""Choose the replica that serves each activated expert.

Shapes: T tokens, K experts of a token, E logical experts. Every expert worker computes the same
choice from the same input, without a word between them; the choice never changes a token.
"""

import torch


def first_replica(topk_ids_TK: torch.Tensor, first_slot_E: torch.Tensor) -> torch.Tensor:
    """The plain policy: always the first replica of an expert.

    first_slot_E (int64) is the expert slot on this worker that holds the expert's first replica, -1
    where another worker holds it. Returns slots_TK alike: -1 marks pairs that others compute.
    """
    return first_slot_E[topk_ids_TK]
