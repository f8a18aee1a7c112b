"""What the expert workers have been doing: a_max for the log, how often each expert is chosen."""

import logging

import numpy as np

from janus_proto.v1 import control_pb2
from janus_scheduler.expert_counts import RecentExpertTokens

logger = logging.getLogger(__name__)

HALF_LIFE_S = 600.0
"""After which a token counts half for the next placement."""

_LOG_INTERVAL_S = 10.0


class ExpertActivity:
    """Follows the reports of one expert worker: all see the same routing and the same schedule."""

    def __init__(self) -> None:
        self.recent_tokens = RecentExpertTokens(HALF_LIFE_S)
        self._logged = control_pb2.ExpertLoad()
        self._logged_s = 0.0

    def report(self, load: control_pb2.ExpertLoad, now_s: float) -> None:
        """Take note of a report; logs what has happened since it last did."""
        self.recent_tokens.update(
            {one.layer: np.array(one.expert_tokens, dtype=np.int64) for one in load.layers}, now_s
        )
        if load.num_layer_steps < self._logged.num_layer_steps:  # another worker's
            self._logged.Clear()
        if now_s - self._logged_s >= _LOG_INTERVAL_S:
            if load.num_layer_steps > self._logged.num_layer_steps:
                logger.info("%s", describe_activity(self._logged, load))
            self._logged.CopyFrom(load)
            self._logged_s = now_s


def describe_activity(before: control_pb2.ExpertLoad, after: control_pb2.ExpertLoad) -> str:
    """One line on the steps between two reports: a_max of each MoE layer."""
    old = {one.layer: one for one in before.layers}
    means: list[str] = []
    steps = 0
    for one in after.layers:
        earlier = old.get(one.layer, control_pb2.LayerLoad())
        new_steps = one.num_steps - earlier.num_steps
        if new_steps:
            steps = max(steps, new_steps)
            means.append(f"{one.layer}: {(one.sum_a_max - earlier.sum_a_max) / new_steps:.1f}")
    return f"a_max by layer, mean of {steps} steps: {', '.join(means)}"
