"""By which policy and which costs the expert workers of an epoch choose replicas."""

import logging
from collections.abc import Sequence

from janus_scheduler.activation import ActivationCosts, Scheduling
from janus_server.controller.config import ScheduleConfig
from janus_server.controller.registration import Registration
from janus_server.errors import ConfigError

logger = logging.getLogger(__name__)


def agreed_scheduling(schedule: ScheduleConfig, experts: Sequence[Registration]) -> Scheduling:
    """The costs are those of the slowest worker, for which the others wait."""
    given = given_costs(schedule)
    measured = [expert.costs for expert in experts]
    costs = [given] if given else [cost for cost in measured if cost is not None]
    agreed = ActivationCosts(
        expert_ps=max((cost.expert_ps for cost in costs), default=1),
        pair_ps=max((cost.pair_ps for cost in costs), default=1),
    )
    logger.info(
        "schedule %s: an expert costs %.1f us, a token-expert pair %.3f us",
        schedule.schedule,
        agreed.expert_ps / 1e6,
        agreed.pair_ps / 1e6,
    )
    return Scheduling(policy=schedule.schedule, costs=agreed)


def given_costs(schedule: ScheduleConfig) -> ActivationCosts | None:
    """The costs that the configuration names, if any; raises ConfigError where they cannot be."""
    if not schedule.expert_us and not schedule.pair_us:
        return None
    for flag, cost_us in (("expert-us", schedule.expert_us), ("pair-us", schedule.pair_us)):
        if not 1e-6 <= cost_us <= 1e6:
            raise ConfigError(
                f"--expert-us and --pair-us must be given together, both between 1e-6 and 1e6: "
                f"--{flag} is {cost_us:g}"
            )
    return ActivationCosts(
        expert_ps=round(1e6 * schedule.expert_us), pair_ps=round(1e6 * schedule.pair_us)
    )
