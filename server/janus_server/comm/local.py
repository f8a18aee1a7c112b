"""Expert workers inside the attention worker's own process: the reference, and monolithic mode."""

from collections.abc import Sequence

import torch

from janus_server.comm.base import DispatchHandle, PartialFfn, sum_partials


class LocalExpertPool:
    """Calls every expert worker's share directly, one after the other."""

    def __init__(self, workers: Sequence[PartialFfn]) -> None:
        self._workers = workers

    def begin_step(self, lane_tokens: Sequence[int]) -> None:
        """Nothing to announce: the experts see the tokens when they come."""

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
        """Nobody waits for a sign of life."""

    def close(self) -> None:
        """Nothing to let go of."""

    def abandon(self) -> None:
        """Nobody waits."""
