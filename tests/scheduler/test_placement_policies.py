"""Placement policies: valid tables always, and better ones where routing is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from janus_bench.routing_traces import RECORDED, read_routing
from janus_scheduler.placement import EMPTY
from janus_scheduler.placement_policies import (
    PLACEMENT_POLICIES,
    PlacementPolicy,
    by_coactivation,
    eplb,
    place,
    place_without_replicas,
    replicate,
)
from janus_scheduler.routing import (
    coactivation,
    expected_load,
    expert_counts,
    sample_batches,
)
from tests.fakes.routing import layer_replicas, skewed_ids


def test_replicas_go_where_a_replica_has_most_tokens() -> None:
    # 12 tokens split to 6 and 6, then 4 each; the expert of 5 comes next.
    assert replicate(np.array([12, 5, 1]), 6, most=4).tolist() == [3, 2, 1]
    # No more replicas than workers.
    assert replicate(np.array([100, 5, 1]), 6, most=2).tolist() == [2, 2, 2]


def test_coactivation_counts_tokens() -> None:
    ids_NK = np.array([[0, 1], [1, 0], [1, 2]])
    both_EE = coactivation(ids_NK, 3)
    assert both_EE.tolist() == [[0, 2, 0], [2, 0, 1], [0, 1, 0]]
    # More than are counted at once.
    assert (coactivation(np.tile(ids_NK, (10_000, 1)), 3) == 10_000 * both_EE).all()
    assert expert_counts(ids_NK, 4).tolist() == [2, 3, 1, 0]


def test_experts_chosen_together_are_kept_apart() -> None:
    both_EE = np.array([[0, 9, 0, 0], [9, 0, 0, 0], [0, 0, 0, 9], [0, 0, 9, 0]])
    table_WC = by_coactivation(np.array([9, 9, 9, 9]), both_EE, 2, 2)
    assert {tuple(sorted(row)) for row in table_WC.tolist()} == {(0, 2), (1, 3)}


def test_eplb_balances_tokens() -> None:
    # The example of DeepSeek's repository: 12 experts in 4 groups, 2 nodes of 4 GPUs, 16 slots.
    counts_E = np.array([90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86])
    table_WC = eplb(counts_E, 8, 2, num_nodes=2, num_groups=4)
    replicas_E = np.bincount(table_WC.ravel(), minlength=12)
    theirs_WC = np.array([5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1]).reshape(8, 2)
    assert replicas_E.tolist() == np.bincount(theirs_WC.ravel(), minlength=12).tolist()
    most, their_most = (
        (counts_E / replicas_E)[table].sum(axis=1).max() for table in (table_WC, theirs_WC)
    )
    assert most <= their_most
    # Each group stays within a node: no expert has replicas on both nodes.
    assert not set(table_WC[:4].ravel()) & set(table_WC[4:].ravel())


def test_a_swap_makes_room_where_only_a_copy_would_fit() -> None:
    # Heaviest first, the last replica of expert 0 finds a free slot only beside its other replica.
    counts_E = np.array([10, 9, 9, 1])
    for table_WC in (
        eplb(counts_E, 2, 3),
        by_coactivation(counts_E, np.zeros((4, 4), dtype=np.int64), 2, 3),
    ):
        assert all(len(set(row)) == 3 for row in table_WC.tolist())


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.data())
def test_every_policy_gives_a_valid_placement(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(1, 20))
    num_workers = data.draw(st.integers(1, num_experts))
    needed = -(-num_experts // num_workers)
    slots = data.draw(st.integers(needed, num_experts))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    top_k = data.draw(st.integers(1, num_experts))
    routing = {
        layer: skewed_ids(rng, data.draw(st.integers(1, 60)), top_k, num_experts, exponent=2.0)
        for layer in (0, 3)
    }
    for policy in PLACEMENT_POLICIES:
        placement = place(
            routing,
            policy,
            num_experts=num_experts,
            num_workers=num_workers,
            slots_per_worker=slots,
            batch_tokens=5,
            effort=10,
            num_nodes=data.draw(st.sampled_from([1, 2])),
            num_groups=data.draw(st.sampled_from([1, 2, 4])),
        )
        placement.check(num_experts)
        assert sorted(placement.layers) == [0, 3]
        for table_WC in placement.layers.values():
            assert table_WC.shape == (num_workers, slots)


def test_search_beats_what_it_starts_from() -> None:
    # Real routing: where choices are independent there is little to gain over balanced counts.
    ids_NK = read_routing(RECORDED / "moe64.npz").layers[3]
    active_BE = sample_batches(ids_NK[4000:], 64, num_tokens=16, num_batches=300, seed=9)
    a_max: dict[PlacementPolicy, float] = {}
    for policy in PLACEMENT_POLICIES:
        placement = place(
            {0: ids_NK[:4000]},
            policy,
            num_experts=64,
            num_workers=8,
            slots_per_worker=8,
            batch_tokens=16,
        )
        counts_E = expert_counts(ids_NK, 64)
        load = expected_load(active_BE, counts_E, placement.replicas(0, 64))
        a_max[policy] = load.a_max
        assert load.floor <= load.a_max < load.a_max_p99
        assert load.imbalance >= 1
    assert a_max["search"] < min(a_max[policy] for policy in PLACEMENT_POLICIES[1:])


def test_without_replicas_every_expert_is_once() -> None:
    ids_NK = read_routing(RECORDED / "demo.npz").layers[0]
    table_WC = place_without_replicas(
        ids_NK, num_experts=32, num_workers=6, slots_per_worker=8, effort=50
    )
    assert table_WC.shape == (6, 8)
    assert sorted(table_WC[table_WC != EMPTY].tolist()) == list(range(32))


def test_expected_load_worked_by_hand() -> None:
    # Worker 0 holds experts 0 and 1, worker 1 expert 2 and a replica of 1.
    table = layer_replicas([[0], [0, 1], [1]], 2)
    active_BE = np.array([[True, True, False], [True, True, True], [False, False, True]])
    load = expected_load(active_BE, np.array([6, 4, 2]), table)
    assert load.a_max == pytest.approx((1 + 2 + 1) / 3)
    assert load.floor == pytest.approx((1 + 2 + 1) / 3)
    # 6 + 2 tokens against 2 + 2.
    assert load.imbalance == pytest.approx(8 / 6)


def test_too_many_slots() -> None:
    with pytest.raises(ValueError, match="a worker has 5 expert slots a layer for 4 experts"):
        place({0: np.array([[0]])}, "eplb", num_experts=4, num_workers=2, slots_per_worker=5)
