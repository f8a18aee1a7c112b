"""What the expert workers have been doing: a_max for the log, how often each expert is chosen."""

import logging

import numpy as np

from janus_proto.v1 import control_pb2
from janus_scheduler.expert_counts import RecentExpertTokens
from janus_scheduler.placement import Placement

logger = logging.getLogger(__name__)

HALF_LIFE_S = 600.0
"""After which a token counts half for the next placement."""

_LOG_INTERVAL_S = 10.0

_MAX_TOKENS = 2**62
"""Of one expert since the worker's start; sums of such totals fit an int64."""


class ExpertActivity:
    """What the expert workers report.

    The tokens and the log follow one worker: all see the same routing and the same schedule.
    """

    def __init__(self, placement: Placement | None) -> None:
        self.recent_tokens = RecentExpertTokens(HALF_LIFE_S)
        self.loads: dict[str, control_pb2.ExpertLoad] = {}
        """Worker id -> what it last reported."""
        layers = placement.layers if placement else {}
        self._num_experts = {layer: int(slots_WC.max()) + 1 for layer, slots_WC in layers.items()}
        self._complained_of: set[str] = set()
        self._logged = control_pb2.ExpertLoad()
        self._logged_s = 0.0

    def report(
        self, worker_id: str, load: control_pb2.ExpertLoad, now_s: float, *, leads: bool
    ) -> None:
        """Take note of a report; `leads`: of the worker that tokens and log follow.

        Raises nothing: a report that is malformed is ignored, and logged once for each worker.
        """
        try:
            self._check(load)
            self.loads[worker_id] = load
            if leads:
                self._follow(load, now_s)
        except Exception as error:
            if worker_id not in self._complained_of:
                self._complained_of.add(worker_id)
                expected = isinstance(error, ValueError)
                logger.warning(
                    "ignored the load that %s reports: %s",
                    worker_id,
                    error,
                    exc_info=None if expected else error,
                )

    def forget(self, worker_id: str) -> None:
        """Let go of what a worker has reported."""
        self.loads.pop(worker_id, None)
        self._complained_of.discard(worker_id)

    def _check(self, load: control_pb2.ExpertLoad) -> None:
        layers = [layer_load.layer for layer_load in load.layers]
        if sorted(set(layers)) != layers or not self._num_experts.keys() >= set(layers):
            raise ValueError("its layers are not those of the placement, ascending")
        for layer_load in load.layers:
            num_counts, num_experts = (
                len(layer_load.expert_tokens),
                self._num_experts[layer_load.layer],
            )
            if num_counts != num_experts:
                raise ValueError(
                    f"it counts {num_counts} experts in layer {layer_load.layer}, which has "
                    f"{num_experts}"
                )
            if max(layer_load.expert_tokens) > _MAX_TOKENS:
                raise ValueError(
                    f"it counts more tokens in layer {layer_load.layer} than there can be"
                )

    def _follow(self, load: control_pb2.ExpertLoad, now_s: float) -> None:
        self.recent_tokens.update(
            {
                layer_load.layer: np.array(layer_load.expert_tokens, dtype=np.int64)
                for layer_load in load.layers
            },
            now_s,
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
    old = {layer_load.layer: layer_load for layer_load in before.layers}
    means: list[str] = []
    steps = 0
    for layer_load in after.layers:
        earlier = old.get(layer_load.layer, control_pb2.LayerLoad())
        new_steps = layer_load.num_steps - earlier.num_steps
        if new_steps:
            steps = max(steps, new_steps)
            means.append(
                f"{layer_load.layer}: {(layer_load.sum_a_max - earlier.sum_a_max) / new_steps:.1f}"
            )
    return f"a_max by layer, mean of {steps} steps: {', '.join(means)}"
