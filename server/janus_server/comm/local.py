"""Expert workers inside the attention worker's own process: the reference, and monolithic mode."""

from collections.abc import Sequence

import torch

from janus_server.comm.base import DispatchHandle, PartialFfn, sum_partials


class LocalExpertPool:
    """Computes the expert workers' shares by direct calls, one after another."""

    def __init__(self, workers: Sequence[PartialFfn]) -> None:
        self._workers = workers

    def begin_step(self, lane_tokens: Sequence[int]) -> None:
        """Do nothing: experts in this process need no announcement."""

    def dispatch(self, layer: int, lane: int, hidden_TH: torch.Tensor) -> DispatchHandle:
        """Compute every worker's share at once."""
        partials = [worker(layer, hidden_TH) for worker in self._workers]
        return DispatchHandle(
            layer=layer,
            lane=lane,
            sent_TH=hidden_TH,
            partials_WTH=torch.stack(partials),
            pending=(),
        )

    def combine(self, handle: DispatchHandle) -> torch.Tensor:
        """Sum of the shares, fp32 [T, H]."""
        return sum_partials(handle.partials_WTH)

    def idle(self) -> None:
        """Do nothing: no process waits for a sign of life."""

    def close(self) -> None:
        """Do nothing: there are no peers."""

    def abandon(self) -> None:
        """Do nothing: no thread waits for a peer."""
