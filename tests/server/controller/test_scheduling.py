import pytest

from janus_proto.v1 import control_pb2
from janus_scheduler.activation import ActivationCosts, Scheduling
from janus_server.controller.config import ScheduleConfig
from janus_server.controller.registration import Registration
from janus_server.controller.scheduling import agreed_scheduling, given_costs
from janus_server.errors import ConfigError


def expert(costs: ActivationCosts | None) -> Registration:
    return Registration(
        role=control_pb2.WORKER_ROLE_EXPERT,
        address="",
        pid=1,
        costs=costs,
        compute=control_pb2.ComputeIdentity(),
        max_batch_tokens=0,
    )


EXPERTS = [
    expert(ActivationCosts(expert_ps=50, pair_ps=3)),
    expert(ActivationCosts(expert_ps=40, pair_ps=4)),
    expert(None),
]


def test_the_slowest_worker_sets_the_costs() -> None:
    assert agreed_scheduling(ScheduleConfig(), EXPERTS) == Scheduling(
        policy="auto", costs=ActivationCosts(expert_ps=50, pair_ps=4)
    )


def test_given_costs_win() -> None:
    given = ScheduleConfig(schedule="exact", expert_us=10, pair_us=0.5)
    assert agreed_scheduling(given, EXPERTS) == Scheduling(
        policy="exact", costs=ActivationCosts(expert_ps=10_000_000, pair_ps=500_000)
    )


@pytest.mark.parametrize(("expert_us", "pair_us"), [(1, 0), (0, 1), (-1, 1), (float("nan"), 1)])
def test_costs_that_cannot_be(expert_us: float, pair_us: float) -> None:
    with pytest.raises(ConfigError, match="must be given together, both between 1e-6 and 1e6"):
        given_costs(ScheduleConfig(expert_us=expert_us, pair_us=pair_us))
