"""The compiled schedule against the oracle, pair by pair, and the GPU kernel against the former."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from janus_kernels.activation_schedule import activation_schedule
from janus_kernels.replica_table import Policy, ReplicaTable, replica_table
from janus_kernels.schedule_counts import empty_counts
from janus_scheduler.activation import POLICIES, ActivationCosts, schedule
from janus_scheduler.placement import LayerReplicas
from tests.fakes.routing import layer_replicas, replicas, skewed_ids

ROOT = Path(__file__).parents[2]


def table_of(layer: LayerReplicas, device: str = "cpu") -> ReplicaTable:
    return replica_table(
        torch.from_numpy(layer.slots_ER).to(device),
        num_workers=layer.num_workers,
        slots_per_worker=layer.slots_per_worker,
    )


def test_policies_are_those_of_the_oracle() -> None:
    assert {policy.name.lower() for policy in Policy} == set(POLICIES)


def test_worked_by_hand() -> None:
    # The example of the module: 2 workers of 2 slots hold experts [0, 1] and [2, 1].
    table = replica_table(
        torch.tensor([[0, -1], [1, 3], [2, -1]], dtype=torch.int32),
        num_workers=2,
        slots_per_worker=2,
    )
    ids_TK = torch.tensor([[0, 1]])
    exact = activation_schedule(ids_TK, table, Policy.EXACT)
    assert exact.slots_TK.tolist() == [[0, 3]]
    assert exact.counts.tokens_WC.tolist() == [[1, 0], [0, 1]]
    assert exact.counts.experts_W.tolist() == [1, 1]
    assert (int(exact.counts.a_max), int(exact.counts.num_batches)) == (1, 1)
    first = activation_schedule(ids_TK, table, Policy.FIRST)
    assert first.counts.tokens_WC.tolist() == [[1, 1], [0, 0]]


def test_bad_tables_are_refused() -> None:
    with pytest.raises(ValueError, match="expert 1 has no expert slot"):
        replica_table(torch.tensor([[0], [-1]]), num_workers=1, slots_per_worker=2)
    with pytest.raises(ValueError, match="slot 2 is beyond 1 workers with 2 slots"):
        replica_table(torch.tensor([[0], [2]]), num_workers=1, slots_per_worker=2)


def assert_as_the_oracle(
    layer: LayerReplicas, ids_TK: np.ndarray, costs: ActivationCosts, device: str = "cpu"
) -> None:
    table = table_of(layer, device)
    for policy in POLICIES:
        expected = schedule(ids_TK, layer, policy, costs=costs, seed=7)
        ours = activation_schedule(
            torch.from_numpy(ids_TK).to(device),
            table,
            Policy[policy.upper()],
            costs_ps=(costs.expert_ps, costs.pair_ps),
            seed=7,
        )
        assert (ours.slots_TK.cpu().numpy() == expected.slots_TK).all(), policy
        assert (ours.counts.tokens_WC.cpu().numpy() == expected.tokens_WC).all(), policy
        assert (ours.counts.experts_W.cpu().numpy() == expected.experts_W).all(), policy
        assert (int(ours.counts.a_max), int(ours.counts.num_batches)) == (expected.a_max, 1)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.data())
def test_equals_the_oracle(data: st.DataObject) -> None:
    layer = data.draw(replicas())
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    top_k = data.draw(st.integers(1, min(8, layer.num_experts)))
    ids_TK = skewed_ids(rng, data.draw(st.integers(0, 90)), top_k, layer.num_experts)
    costs = ActivationCosts(
        expert_ps=data.draw(st.integers(1, 60)), pair_ps=data.draw(st.integers(1, 9))
    )
    assert_as_the_oracle(layer, ids_TK, costs)


def interpreted_cases() -> list[tuple[LayerReplicas, np.ndarray]]:
    """A few cases, as the interpreter is slow: long paths, many workers, one or all replicas."""
    rng = np.random.default_rng(5)
    chain = layer_replicas([[w] if w == 0 else [w - 1, w] for w in [0, 0, 1, 1, 2, 3, 4]], 5)
    full = layer_replicas([list(range(4))] * 7, 4)
    wide = layer_replicas([sorted(map(int, rng.permutation(64)[:3])) for _ in range(9)], 64)
    single = layer_replicas([[w % 3] for w in range(6)], 3)
    mixed = [sorted(map(int, rng.permutation(6)[: rng.integers(1, 4)])) for _ in range(21)]
    cases = [(table, 12, 2) for table in (chain, full, wide, single)]
    cases += [(layer_replicas(mixed, 6), num_tokens, 4) for num_tokens in (0, 1, 40)]
    # Expert 2 makes worker 1 the fullest, unless expert 1 moves to worker 0, and 0 on to worker 3.
    path = layer_replicas([[0, 3], [0, 1], [1, 2], [2]], 4), np.arange(4)[:, None]
    return [
        path,
        *(
            (table, skewed_ids(rng, num_tokens, top_k, table.num_experts))
            for table, num_tokens, top_k in cases
        ),
    ]


def test_the_triton_kernel_in_the_interpreter() -> None:
    """In a process of its own: the interpreter replaces what the offline compilation needs."""
    path = os.pathsep.join([str(ROOT), *sys.path])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    subprocess.run([sys.executable, __file__, "interpret"], env=environment, check=True, timeout=90)


def interpret() -> None:
    from janus_kernels.activation_schedule_triton import launch

    paths = 0
    for layer, ids_TK in interpreted_cases():
        table = table_of(layer)
        ids = torch.from_numpy(ids_TK)
        for policy in Policy:
            for costs_ps in ((30, 2), (1, 9)) if policy is Policy.AUTO else ((1, 1),):
                expected = activation_schedule(ids, table, policy, costs_ps=costs_ps, seed=9)
                slots_TK, counts = torch.zeros_like(expected.slots_TK), empty_counts(table)
                launch(ids, table, policy, costs_ps, 9, slots_TK, counts)
                assert torch.equal(slots_TK, expected.slots_TK), policy
                assert torch.equal(counts.packed, expected.counts.packed), policy
        a_max = [
            int(activation_schedule(ids, table, policy).counts.a_max)
            for policy in (Policy.AEBS, Policy.EXACT)
        ]
        paths += a_max[1] < a_max[0]
    assert paths, "no case needs an augmenting path"


@pytest.mark.parametrize("policy", list(Policy))
@pytest.mark.parametrize("num_tokens", [64, 4096])
def test_compiles_for_a_gpu(policy: Policy, num_tokens: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from janus_kernels import activation_schedule_triton as kernel

    hosts = [[e % 8] if e % 4 else sorted({e % 8, (e + 3) % 8}) for e in range(160)]
    constants = kernel.constants(
        table_of(layer_replicas(hosts, 8)), policy, num_tokens=num_tokens, top_k=6
    )
    options = {"num_warps": constants.pop("num_warps")}
    types = {name: f"*{kind}" if name.endswith("_ptr") else kind for name, kind in ARGUMENTS}
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=kernel._schedule_kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared < 100_000


ARGUMENTS = [
    ("ids_ptr", "i64"),
    ("slots_ptr", "i32"),
    ("num_replicas_ptr", "i32"),
    ("replicated_ptr", "i32"),
    ("slot_ptr", "i32"),
    ("hosts_ptr", "i64"),
    ("scratch_ptr", "i32"),
    ("out_slots_ptr", "i32"),
    ("slot_tokens_ptr", "i32"),
    ("worker_experts_ptr", "i32"),
    ("a_max_ptr", "i32"),
    ("num_batches_ptr", "i32"),
    ("num_pairs", "i32"),
    ("num_replicated", "i32"),
    ("expert_ps", "i64"),
    ("pair_ps", "i64"),
    ("seed", "i32"),
]


@pytest.mark.gpu
def test_equals_the_oracle_on_a_gpu() -> None:
    for layer, ids_TK in interpreted_cases():
        for costs in (
            ActivationCosts(expert_ps=30, pair_ps=2),
            ActivationCosts(expert_ps=1, pair_ps=9),
        ):
            assert_as_the_oracle(layer, ids_TK, costs, "cuda")


@pytest.mark.gpu
def test_replays_in_a_graph() -> None:
    layer, ids_TK = interpreted_cases()[-1]
    table = table_of(layer, "cuda")
    ids = torch.from_numpy(ids_TK).cuda()
    activation_schedule(ids, table, Policy.EXACT)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chosen = activation_schedule(ids, table, Policy.EXACT)
    ids.copy_(ids.flip(0))
    graph.replay()
    expected = schedule(ids.cpu().numpy(), layer, "exact")
    assert (chosen.slots_TK.cpu().numpy() == expected.slots_TK).all()


if __name__ == "__main__":
    assert sys.argv[1:] == ["interpret"]
    interpret()
