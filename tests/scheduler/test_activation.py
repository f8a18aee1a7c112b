"""The oracle of the activation schedule: worked cases, invariants, and an independent optimum."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from janus_bench.optimum import least_a_max
from janus_scheduler.activation import (
    POLICIES,
    ActivationCosts,
    SchedulePolicy,
    activated,
    fill_up,
    floor,
    schedule,
)
from tests.fakes.routing import layer_replicas, replicas, skewed_ids

COSTS = ActivationCosts(expert_ps=30, pair_ps=2)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        # Experts 0 and 1 only on worker 0, 2 on both, 3 on worker 1 and 2, 4 on all.
        ("first", [4, 1, 0]),
        # Expert by expert: 0 and 1 to worker 0; 2, 3 and 4 where fewest are.
        ("aebs", [2, 2, 1]),
        ("metro", [2, 2, 1]),
        ("exact", [2, 2, 1]),
    ],
)
def test_worked_by_hand(policy: SchedulePolicy, expected: list[int]) -> None:
    table = layer_replicas([[0], [0], [0, 1], [1, 2], [0, 1, 2]], 3)
    chosen = schedule(np.array([[0, 1], [2, 3], [4, 0]]), table, policy)
    assert chosen.experts_W.tolist() == expected
    assert chosen.a_max == max(expected)
    assert chosen.tokens_WC.sum() == 6


def test_exact_goes_back_on_a_greedy_choice() -> None:
    # Greedy sends expert 0 to worker 0 and expert 1 to worker 1, so that expert 2 finds no empty
    # worker. Then worker 0 has two; for it to have one, expert 0 must move on to worker 2.
    table = layer_replicas([[0, 2], [1, 2], [0, 1]], 3)
    ids_TK = np.array([[0], [1], [2]])
    assert schedule(ids_TK, table, "aebs").experts_W.tolist() == [2, 1, 0]
    assert schedule(ids_TK, table, "exact").experts_W.tolist() == [1, 1, 1]


def test_forced_experts_first() -> None:
    # METRO meets expert 0 before it knows that expert 1 has no choice.
    table = layer_replicas([[0, 1], [0]], 2)
    ids_TK = np.array([[0, 1]])
    assert schedule(ids_TK, table, "metro").a_max == 2
    assert schedule(ids_TK, table, "aebs").a_max == 1


def test_positions() -> None:
    table = layer_replicas([[0, 1], [0, 1]], 2)
    ids_TK = np.array([[0, 1], [0, 1], [1, 0]])
    # Pairs 0 to 5 in turn to replica 0 and 1.
    assert (schedule(ids_TK, table, "eplb").slots_TK // 2).tolist() == [[0, 1], [0, 1], [0, 1]]


def test_random_is_even_and_follows_its_seed() -> None:
    table = layer_replicas([[0, 1, 2], [0, 1, 2]], 3)
    ids_TK = np.array([[0, 1]] * 300)
    first, again, other = (schedule(ids_TK, table, "random", seed=seed) for seed in (1, 1, 2))
    assert (first.slots_TK == again.slots_TK).all()
    assert 300 < (first.slots_TK != other.slots_TK).sum() < 500  # two thirds of 600
    for tokens_W in (chosen.tokens_WC.sum(axis=1) for chosen in (first, other)):
        assert (abs(tokens_W - 200) < 50).all()


def test_token_levels_the_tokens() -> None:
    # 8 tokens of expert 0 on both workers, 4 of expert 1 on worker 1 alone: 6 each.
    table = layer_replicas([[0, 1], [1]], 2)
    ids_TK = np.array([0] * 8 + [1] * 4)[:, None]
    tokens_W = schedule(ids_TK, table, "token").tokens_WC.sum(axis=1)
    assert tokens_W.sum() == 12
    # Dealt out by the tokens' indices, which is even up to a token or so.
    assert abs(int(tokens_W[0]) - 6) <= 1


@pytest.mark.parametrize(
    ("loads", "amount", "poured"),
    [
        ([0, 0], 5, [3, 2]),
        ([0, 10], 5, [5, 0]),
        ([0, 10], 20, [15, 5]),
        ([3, 1, 2], 0, [0, 0, 0]),
        ([2, 0, 0], 3, [0, 2, 1]),
        ([4, 4, 0], 6, [1, 1, 4]),
    ],
)
def test_fill_up(loads: list[int], amount: int, poured: list[int]) -> None:
    assert fill_up(np.array(loads), amount).tolist() == poured


def test_auto_reads_little_in_decode_and_computes_evenly_in_prefill() -> None:
    table = layer_replicas([[0, 1], [0, 1]], 2)
    decode = schedule(np.array([[0], [0]]), table, "auto", costs=COSTS)
    assert decode.experts_W.tolist() == [1, 0]
    # 400 tokens of one expert cost 830 on one worker, but 430 on each of two.
    prefill = schedule(np.zeros((400, 1), dtype=int), table, "auto", costs=COSTS)
    assert prefill.experts_W.tolist() == [1, 1]
    assert prefill.tokens_WC.sum(axis=1).tolist() == [199, 201]


def test_costs_must_be_above_zero() -> None:
    with pytest.raises(ValueError, match="must be from 1 to"):
        ActivationCosts(expert_ps=0, pair_ps=1)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.data())
def test_every_pair_is_computed_once_where_its_expert_is(data: st.DataObject) -> None:
    table = data.draw(replicas())
    top_k = data.draw(st.integers(1, table.num_experts))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    ids_TK = skewed_ids(rng, data.draw(st.integers(0, 40)), top_k, table.num_experts)
    for policy in POLICIES:
        chosen = schedule(ids_TK, table, policy, costs=COSTS, seed=3)
        held_TK = (table.slots_ER[ids_TK] == chosen.slots_TK[:, :, None]).any(axis=2)
        assert held_TK.all(), policy
        assert chosen.tokens_WC.sum() == ids_TK.size
        again = schedule(ids_TK.copy(), table, policy, costs=COSTS, seed=3)
        assert (again.slots_TK == chosen.slots_TK).all()
        if policy in ("first", "metro", "aebs", "exact"):
            # A single replica of each expert is read.
            assert chosen.experts_W.sum() == len(np.unique(ids_TK))


@settings(derandomize=True, deadline=None, max_examples=1500)
@given(st.data())
def test_exact_is_optimal(data: st.DataObject) -> None:
    table = data.draw(replicas())
    rng = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    active_E = rng.random(table.num_experts) < data.draw(st.floats(0.05, 1))
    active = np.flatnonzero(active_E)
    if not len(active):
        return
    optimum = least_a_max(active, table)
    assert schedule(active[:, None], table, "exact").a_max == optimum
    assert activated(active_E[None], table)[0].max() == optimum
    assert floor(active_E[None], table)[0] <= optimum
    for policy in POLICIES:
        assert schedule(active[:, None], table, policy, costs=COSTS).a_max >= optimum


def test_many_batches_at_once_count_as_one_by_one() -> None:
    rng = np.random.default_rng(1)
    hosts = [sorted(map(int, rng.permutation(6)[: rng.integers(1, 4)])) for _ in range(40)]
    table = layer_replicas(hosts, 6)
    active_BE = rng.random((50, 40)) < rng.random((50, 1))
    active_BE[:, 0] = True
    expected = [schedule(np.flatnonzero(a)[:, None], table, "exact").experts_W for a in active_BE]
    assert (activated(active_BE, table)[0] == np.stack(expected)).all()
