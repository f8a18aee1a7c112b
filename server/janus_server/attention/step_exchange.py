"""One step's traffic with the expert workers, and what of it is still due.

The expert workers have been told how many rows come for every layer and lane, and wait for each of
them. So a step that fails half-way is walked to its end with rows of zeros: nobody is left waiting,
and the next step starts as if nothing had happened.
"""

from collections import deque
from collections.abc import Sequence

import torch

from janus_server.comm.base import DispatchHandle, ExpertPool
from janus_server.errors import PeerLostError


class StepExchange:
    """Dispatches and combines of one step, in the order in which the expert workers walk it."""

    def __init__(
        self, pool: ExpertPool, *, moe_layers: Sequence[int], lane_tokens: Sequence[int]
    ) -> None:
        """Announce the step."""
        self._pool = pool
        self._lane_tokens = lane_tokens
        lanes = range(len(lane_tokens))
        self._due = deque((layer, lane) for layer in moe_layers for lane in lanes)
        self._under_way: dict[int, DispatchHandle] = {}
        """Lane -> its dispatch that was not combined yet."""
        pool.begin_step(lane_tokens)

    def dispatch(self, layer: int, lane: int, hidden_TH: torch.Tensor) -> None:
        """Send the lane's hidden states to the experts; does not wait."""
        assert self._due[0] == (layer, lane), f"{(layer, lane)} is not what the experts wait for"
        self._under_way[lane] = self._pool.dispatch(layer, lane, hidden_TH)
        self._due.popleft()

    def combine(self, lane: int) -> torch.Tensor | None:
        """What the experts made of the lane's last dispatch, fp32 [T, H]; None without one."""
        handle = self._under_way.pop(lane, None)
        return None if handle is None else self._pool.combine(handle)

    def walk_to_end(self, hidden_size: int, dtype: torch.dtype) -> None:
        """Send zeros for all that is due, and take all answers.

        Raises PeerLostError where a peer is lost, or where not even this works: then the step's
        other participants cannot be kept in step any more.
        """
        try:
            while self._due:
                layer, lane = self._due[0]
                self.combine(lane)
                zeros_TH = torch.zeros(self._lane_tokens[lane], hidden_size, dtype=dtype)
                self.dispatch(layer, lane, zeros_TH)
            for lane in list(self._under_way):
                self.combine(lane)
        except PeerLostError:
            raise
        except Exception as error:
            self._pool.abandon()
            raise PeerLostError("a failed step could not be walked to its end") from error
