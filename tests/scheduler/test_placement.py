"""Placements: every expert has a slot, no worker holds an expert twice, errors name the culprit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from janus_scheduler.placement import EMPTY, Placement, round_robin


def one_layer(*workers: list[int]) -> Placement:
    return Placement(
        num_workers=len(workers),
        slots_per_worker=len(workers[0]),
        layers={5: np.array(workers, dtype=np.int32)},
    )


def test_every_layer_begins_at_another_worker() -> None:
    placement = round_robin(moe_layers=(1, 3, 4), num_experts=4, num_workers=2)
    assert placement.slots_per_worker == 2
    assert {layer: table.tolist() for layer, table in placement.layers.items()} == {
        1: [[0, 2], [1, 3]],
        3: [[1, 3], [0, 2]],
        4: [[0, 2], [1, 3]],
    }


def test_spare_slots_hold_replicas() -> None:
    placement = round_robin(moe_layers=(0, 1), num_experts=3, num_workers=2)
    assert placement.layers[0].tolist() == [[0, 2], [1, 0]]
    # Expert 1 would be next in this layer, but worker 0 holds it already.
    assert placement.layers[1].tolist() == [[1, 2], [0, 2]]
    replicas = placement.replicas(1, 3)
    assert replicas.slots_ER.tolist() == [[2, -1], [0, -1], [1, 3]]
    assert replicas.workers_ER.tolist() == [[1, -1], [0, -1], [0, 1]]


def test_replicas_take_turns() -> None:
    placement = round_robin(moe_layers=(0,), num_experts=4, num_workers=2, slots_per_worker=3)
    assert placement.layers[0].tolist() == [[0, 2, 1], [1, 3, 2]]


def test_replicas_are_spread_evenly() -> None:
    placement = round_robin(moe_layers=(0, 1), num_experts=4, num_workers=3, slots_per_worker=3)
    for layer in (0, 1):
        assert sorted(placement.replicas(layer, 4).num_replicas_E.tolist()) == [2, 2, 2, 3]


def test_a_worker_never_needs_more_slots_than_experts() -> None:
    placement = round_robin(moe_layers=(0,), num_experts=2, num_workers=2, slots_per_worker=4)
    assert placement.layers[0].tolist() == [[0, 1, EMPTY, EMPTY], [1, 0, EMPTY, EMPTY]]
    placement.check(2)
    assert placement.replicas(0, 2).slots_ER.tolist() == [[0, 5], [1, 4]]


@settings(derandomize=True, deadline=None)
@given(st.data())
def test_round_robin_serves_every_expert(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(1, 24), "experts")
    num_workers = data.draw(st.integers(1, num_experts), "workers")
    needed = -(-num_experts // num_workers)
    num_slots = data.draw(st.none() | st.integers(needed, num_experts + 2), "slots")
    moe_layers = data.draw(st.lists(st.integers(0, 40), unique=True, max_size=4).map(sorted))
    placement = round_robin(
        moe_layers=moe_layers,
        num_experts=num_experts,
        num_workers=num_workers,
        slots_per_worker=num_slots,
    )
    placement.check(num_experts)
    assert placement.slots_per_worker == (num_slots or needed)
    assert sorted(placement.layers) == moe_layers
    for turn, layer in enumerate(moe_layers):
        replicas = placement.replicas(layer, num_experts)
        for expert, workers in enumerate(replicas.workers_ER.tolist()):
            used = [worker for worker in workers if worker != EMPTY]
            assert (expert + turn) % num_workers in used
            assert used == sorted(set(used))
            assert len(used) == replicas.num_replicas_E[expert]
        for worker in range(num_workers):
            slots = placement.worker_slots(layer, worker)
            assert slots.dtype == np.int32
            filled = min(placement.slots_per_worker, num_experts)
            assert (slots[:filled] != EMPTY).all()
            assert (slots[filled:] == EMPTY).all()


def test_more_workers_than_experts() -> None:
    with pytest.raises(ValueError, match="more expert workers than experts: 5 workers, 4 experts"):
        round_robin(moe_layers=(0,), num_experts=4, num_workers=5)


def test_too_few_slots() -> None:
    with pytest.raises(ValueError, match="7 experts on 2 expert workers need 4 expert slots"):
        round_robin(moe_layers=(0,), num_experts=7, num_workers=2, slots_per_worker=3)


@pytest.mark.parametrize(
    ("workers", "sentence"),
    [
        (([0, 1], [2, 1]), "layer 5: expert 3 has no slot on any expert worker"),
        (([0, 1, 2], [0, 3, 3]), "layer 5: expert worker 1 holds expert 3 more than once"),
        (([0, 1], [2, 4]), "layer 5: expert worker 1 holds expert 4, but the experts are 0 to 3"),
        (([-2, 1], [2, 3]), "layer 5: expert worker 0 holds expert -2, but"),
    ],
)
def test_check_names_the_culprit(workers: tuple[list[int], ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        one_layer(*workers).check(4)


def test_check_accepts_empty_slots_and_replicas() -> None:
    one_layer([0, EMPTY, 1], [EMPTY, 1, 2]).check(3)


def test_tables_have_the_shape_that_is_claimed() -> None:
    with pytest.raises(ValueError, match=r"layer 2 is for \(2, 3\) workers and slots, not \(3, 2"):
        Placement(num_workers=3, slots_per_worker=2, layers={2: np.zeros((2, 3), dtype=np.int32)})


def test_tables_are_read_only() -> None:
    placement = round_robin(moe_layers=(0,), num_experts=2, num_workers=1)
    with pytest.raises(ValueError, match="read-only"):
        placement.worker_slots(0, 0)[0] = 1
