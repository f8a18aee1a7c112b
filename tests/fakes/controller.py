"""A controller's membership for a small model."""

from janus_server.controller.config import PoolConfig, ScheduleConfig
from janus_server.controller.membership import Membership
from janus_server.controller.placement import first_placement
from tests.fakes.model_specs import SMALL_SPEC


def members_of(pools: PoolConfig, schedule: ScheduleConfig | None = None) -> Membership:
    placement = first_placement(pools, SMALL_SPEC) if pools.expert_workers else None
    return Membership(
        fingerprint="same",
        pools=pools,
        placement=placement,
        schedule=schedule or ScheduleConfig(),
    )
