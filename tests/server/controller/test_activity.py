"""What is made of the reports of the expert workers."""

import logging

import numpy as np
import pytest

from janus_proto.v1 import control_pb2
from janus_scheduler.expert_counts import RecentExpertTokens
from janus_scheduler.placement import round_robin
from janus_server.controller.activity import ExpertActivity

PLACEMENT = round_robin(moe_layers=(1, 2), num_experts=3, num_workers=1, slots_per_worker=3)


def load(steps: int, sum_a_max: int, layers: tuple[int, ...] = (1, 2)) -> control_pb2.ExpertLoad:
    loads = [
        control_pb2.LayerLoad(
            layer=layer, num_steps=steps, sum_a_max=sum_a_max + layer, expert_tokens=[steps, 0, 1]
        )
        for layer in layers
    ]
    return control_pb2.ExpertLoad(num_layer_steps=2 * steps, layers=loads)


def test_logs_the_a_max_of_each_layer_since_the_last_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    activity = ExpertActivity(PLACEMENT)
    for steps, sum_a_max, now_s in (
        (4, 8, 100.0),
        (6, 10, 101.0),  # too soon
        (8, 20, 110.0),
        (8, 20, 120.0),  # nothing new
    ):
        activity.report("expert-0", load(steps, sum_a_max), now_s, leads=True)
    assert caplog.messages == [
        "a_max by layer, mean of 4 steps: 1: 2.2, 2: 2.5",
        "a_max by layer, mean of 4 steps: 1: 3.0, 2: 3.0",
    ]
    activity.report(
        "expert-1", load(1, 3), 130.0, leads=True
    )  # of another worker, whose counts begin at 0
    assert caplog.messages[-1] == "a_max by layer, mean of 1 steps: 1: 4.0, 2: 5.0"


def with_tokens(*tokens: int) -> control_pb2.ExpertLoad:
    return control_pb2.ExpertLoad(layers=[control_pb2.LayerLoad(layer=1, expert_tokens=tokens)])


@pytest.mark.parametrize(
    "malformed",
    [
        load(9, 9, layers=(1, 3)),
        load(9, 9, layers=(2, 1)),
        load(9, 9, layers=(1, 1)),
        with_tokens(),
        with_tokens(1, 2),
        with_tokens(1, 2, 3, 4),
        with_tokens(2**63, 0, 0),
    ],
)
def test_a_malformed_report_is_ignored_and_logged_once(
    malformed: control_pb2.ExpertLoad, caplog: pytest.LogCaptureFixture
) -> None:
    activity = ExpertActivity(PLACEMENT)
    activity.report("expert-0", load(4, 8), 1.0, leads=True)
    for now_s in (2.0, 3.0):
        activity.report("expert-0", malformed, now_s, leads=True)
    assert activity.loads == {"expert-0": load(4, 8)}
    assert activity.recent_tokens.of()[1].tolist() == [4, 0, 1]
    [message] = caplog.messages
    assert message.startswith("ignored the load that expert-0 reports: it")


def test_without_expert_workers_there_is_nothing_to_report() -> None:
    activity = ExpertActivity(None)
    activity.report("attention-0", load(4, 8), 1.0, leads=False)
    assert activity.loads == {}


class BrokenTokens(RecentExpertTokens):
    def update(self, totals: object, now_s: float) -> None:
        raise IndexError("a fault of ours")


def test_a_fault_of_the_controller_harms_no_heartbeat(caplog: pytest.LogCaptureFixture) -> None:
    activity = ExpertActivity(PLACEMENT)
    activity.recent_tokens = BrokenTokens(1.0)
    for now_s in (1.0, 2.0):
        activity.report("expert-0", load(4, 8), now_s, leads=True)
    assert caplog.messages == ["ignored the load that expert-0 reports: a fault of ours"]
    assert "IndexError" in caplog.text


def test_only_the_worker_that_leads_is_counted() -> None:
    activity = ExpertActivity(PLACEMENT)
    for worker_id, leads in (("expert-0", True), ("expert-1", False)):
        activity.report(worker_id, load(4, 8), 1.0, leads=leads)
    np.testing.assert_array_equal(activity.recent_tokens.of()[2], [4, 0, 1])
    assert activity.loads.keys() == {"expert-0", "expert-1"}
