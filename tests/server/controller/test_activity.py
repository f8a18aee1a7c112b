"""What the log says of the expert workers."""

import logging

import pytest

from janus_proto.v1 import control_pb2
from janus_server.controller.activity import ExpertActivity


def load(steps: int, sum_a_max: int) -> control_pb2.ExpertLoad:
    layers = [
        control_pb2.LayerLoad(layer=layer, num_steps=steps, sum_a_max=sum_a_max + layer)
        for layer in (1, 2)
    ]
    return control_pb2.ExpertLoad(num_layer_steps=2 * steps, layers=layers)


def test_logs_the_a_max_of_each_layer_since_the_last_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    activity = ExpertActivity()
    activity.report(load(4, 8), 100.0)
    activity.report(load(6, 10), 101.0)  # too soon
    activity.report(load(8, 20), 110.0)
    activity.report(load(8, 20), 120.0)  # nothing new
    assert caplog.messages == [
        "a_max by layer, mean of 4 steps: 1: 2.2, 2: 2.5",
        "a_max by layer, mean of 4 steps: 1: 3.0, 2: 3.0",
    ]
    activity.report(load(1, 3), 130.0)  # another worker counts from 0
    assert caplog.messages[-1] == "a_max by layer, mean of 1 steps: 1: 4.0, 2: 5.0"
