"""An epoch as its messages, and messages that are none."""

from collections.abc import Callable

import pytest

from janus_proto.v1 import control_pb2
from janus_scheduler.activation import ActivationCosts, Scheduling
from janus_scheduler.placement import round_robin
from janus_server.comm.config import CommConfig
from janus_server.comm.epoch import (
    check_epoch,
    group_config,
    placement_message,
    placement_of,
    scheduling_message,
    scheduling_of,
)
from janus_server.errors import UnavailableError
from tests.fakes.model_specs import SMALL_SPEC

PLACEMENT = round_robin(
    moe_layers=SMALL_SPEC.moe_layers, num_experts=SMALL_SPEC.num_experts, num_workers=2
)
SCHEDULING = Scheduling(policy="exact", costs=ActivationCosts(expert_ps=5, pair_ps=7))


def an_epoch() -> control_pb2.Epoch:
    return control_pb2.Epoch(
        number=1,
        attention_workers=[
            control_pb2.Worker(worker_id="attention-0", rank=0, max_batch_tokens=64)
        ],
        expert_workers=[
            control_pb2.Worker(worker_id=f"expert-{index}", rank=1 + index) for index in range(2)
        ],
        placement=placement_message(PLACEMENT),
        scheduling=scheduling_message(SCHEDULING),
        store_address="10.0.0.1:7000",
        store_prefix="epoch-1",
    )


def test_what_an_epoch_says() -> None:
    epoch = an_epoch()
    check_epoch(epoch)
    assert scheduling_of(epoch) == SCHEDULING
    placement = placement_of(epoch, SMALL_SPEC)
    assert {layer: table.tolist() for layer, table in placement.layers.items()} == {
        layer: table.tolist() for layer, table in PLACEMENT.layers.items()
    }
    group = group_config(
        epoch, "expert-1", CommConfig(), controller="10.0.0.9:1", own_host="10.0.0.2"
    )
    assert (group.rank, group.num_attention, group.num_experts) == (2, 1, 2)
    assert (group.store_address, group.max_batch_tokens) == ("10.0.0.1:7000", (64,))


def clear_attention(epoch: control_pb2.Epoch) -> None:
    del epoch.attention_workers[:]


def clear_layer(epoch: control_pb2.Epoch) -> None:
    del epoch.placement.layers[0]


def repeat_layer(epoch: control_pb2.Epoch) -> None:
    epoch.placement.layers.append(epoch.placement.layers[0])


def shorten_layer(epoch: control_pb2.Epoch) -> None:
    del epoch.placement.layers[0].slot_experts[-1]


def drop_worker(epoch: control_pb2.Epoch) -> None:
    del epoch.expert_workers[-1]


def set_expert(expert: int) -> Callable[[control_pb2.Epoch], None]:
    def change(epoch: control_pb2.Epoch) -> None:
        epoch.placement.layers[0].slot_experts[0] = expert

    return change


def merge(**fields: object) -> Callable[[control_pb2.Epoch], None]:
    def change(epoch: control_pb2.Epoch) -> None:
        for name, value in fields.items():
            setattr(epoch, name, value)

    return change


def set_worker(**fields: object) -> Callable[[control_pb2.Epoch], None]:
    def change(epoch: control_pb2.Epoch) -> None:
        for name, value in fields.items():
            setattr(epoch.attention_workers[0], name, value)

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (merge(number=0), "it has no number or no attention worker"),
        (clear_attention, "it has no number or no attention worker"),
        (set_worker(rank=1), "its ranks are not those of its workers in order"),
        (set_worker(rank=2**32 - 1), "its ranks are not those of its workers in order"),
        (set_worker(worker_id="expert-1"), "it has a worker twice"),
        (set_worker(max_batch_tokens=0), "max_batch_tokens is 0"),
        (set_worker(max_batch_tokens=2**32 - 1), "max_batch_tokens is 4294967295"),
        (merge(store_address=""), "is not HOST:PORT"),
        (merge(store_address="host"), "is not HOST:PORT"),
        (merge(store_address="host:99999"), "is above 65535"),
        (merge(store_prefix=""), "its keys in the store have no prefix"),
    ],
)
def test_an_epoch_whose_parts_do_not_fit(
    change: Callable[[control_pb2.Epoch], None], sentence: str
) -> None:
    epoch = an_epoch()
    change(epoch)
    with pytest.raises(UnavailableError, match="of the controller cannot be used: ") as raised:
        check_epoch(epoch)
    assert sentence in str(raised.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (drop_worker, "its placement is for 2 expert workers"),
        (clear_layer, "its placement is for other MoE layers"),
        (repeat_layer, "its placement has a layer twice"),
        (shorten_layer, "cannot reshape array of size 5"),
        (set_expert(99), "holds expert 99, but the experts are 0 to 4"),
        (set_expert(-2), "holds expert -2, but the experts are 0 to 4"),
        (lambda epoch: epoch.ClearField("placement"), "is for 0 expert workers"),
    ],
)
def test_a_placement_of_something_else(
    change: Callable[[control_pb2.Epoch], None], sentence: str
) -> None:
    epoch = an_epoch()
    change(epoch)
    with pytest.raises(
        UnavailableError, match="epoch 1 of the controller cannot be used"
    ) as raised:
        placement_of(epoch, SMALL_SPEC)
    assert sentence in str(raised.value)


def test_a_schedule_that_is_none() -> None:
    epoch = an_epoch()
    epoch.scheduling.costs.pair_ps = 0
    with pytest.raises(UnavailableError, match="epoch 1 of the controller cannot be used: the cos"):
        scheduling_of(epoch)
    epoch.scheduling.policy = "luck"
    with pytest.raises(UnavailableError, match="asks for the schedule 'luck'"):
        scheduling_of(epoch)


def test_a_worker_outside_the_epoch() -> None:
    with pytest.raises(UnavailableError, match="expert-2 is not a member of epoch 1: it is full"):
        group_config(an_epoch(), "expert-2", CommConfig(), controller="c:1", own_host="h")
