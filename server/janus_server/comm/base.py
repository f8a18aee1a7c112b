"""What an attention worker and an expert worker exchange within a step.

Attention side, for every MoE layer and lane: `dispatch` sends the hidden states of the lane's
tokens to every expert worker and returns a handle; `combine` takes that handle and returns, per
token, the sum of the experts' outputs. Both sides go through layers, and lanes within a layer, in
ascending order. The expert workers know the token counts of all participants and lanes before the
first layer, from the announcement of the step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch

PartialFfn = Callable[[int, torch.Tensor], torch.Tensor]
"""(layer, hidden_TH) -> partial_TH: an expert worker's share of an MoE layer, dtype of hidden."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatchHandle:
    """A dispatch under way; `combine` consumes it, once."""

    layer: int
    lane: int
    sent_TH: torch.Tensor
    """What was sent: the transport may read from it until `pending` is done."""
    partials_WTH: torch.Tensor
    """[expert workers, tokens, hidden]; complete once `pending` is done."""
    pending: Sequence["PendingTransfer"]


class PendingTransfer(Protocol):
    """A transfer under way, like torch.distributed's Work."""

    def wait(self, timeout: timedelta = ..., /) -> bool:
        """Block until it is done; raises RuntimeError if the peer is gone or too late.

        The deadline is the group's unless one is given; its time starts with this call.
        """
        ...


class ExpertPool(Protocol):
    """The expert workers of an epoch, as one attention worker sees them."""

    def begin_step(self, lane_tokens: Sequence[int]) -> None:
        """Announce a step with these token counts per lane."""
        ...

    def dispatch(self, layer: int, lane: int, hidden_TH: torch.Tensor) -> DispatchHandle:
        """Send the lane's hidden states to all expert workers; does not wait."""
        ...

    def combine(self, handle: DispatchHandle) -> torch.Tensor:
        """Sum of the expert workers' partial results, fp32 [T, H], in the order of their ranks."""
        ...

    def idle(self) -> None:
        """Announce that there is no work for now; idle workers repeat it as a sign of life."""
        ...

    def close(self) -> None:
        """Announce that no step follows, and let go of the peers."""
        ...

    def abandon(self) -> None:
        """Let go at once, from any thread: a thread that waits for a peer raises PeerLostError."""
        ...


def sum_partials(partials_WTH: torch.Tensor) -> torch.Tensor:
    """Add the partial results in fp32, worker by worker, so that the order never varies."""
    total_TH = partials_WTH[0].float()
    for partial_TH in partials_WTH[1:]:
        total_TH = total_TH + partial_TH
    return total_TH
