"""How experts and their replicas are placed, from recorded routing; `placement` has the table.

Shapes: W expert workers, C expert slots of a worker, S = W * C, E logical experts, N recorded
tokens, K experts of a token, B batches.

Policies, each for one layer:

- `round_robin`: experts dealt out in turn, whatever the routing.
- `eplb`: replicas by tokens per replica, the heaviest first to the worker with the fewest tokens;
  hierarchical where expert groups divide the nodes (github.com/deepseek-ai/EPLB, whose packing may
  put two copies of an expert on one GPU: ours never does).
- `coactivation`: the same replicas, each on the worker whose experts are least often chosen
  together with it (arXiv 2512.13525, appendix B).
- `search`: starts from the best of these, and keeps changes that lower the expected a_max of the
  `exact` schedule.
"""

from collections.abc import Callable, Mapping
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from janus_scheduler.activation import activated
from janus_scheduler.placement import EMPTY, LayerReplicas, Placement, SlotExperts, round_robin
from janus_scheduler.routing import ExpertIds, coactivation, expert_counts, sample_batches

PlacementPolicy = Literal["search", "coactivation", "eplb", "round_robin"]
PLACEMENT_POLICIES: tuple[PlacementPolicy, ...] = get_args(PlacementPolicy)

_SEARCH_BATCHES = 256
"""With fewer batches, the search would fit these batches rather than the routing."""

Counts = npt.NDArray[np.int64]
AddedCost = Callable[[int, int, list[list[int]]], float]
"""(expert, worker, experts of each worker) -> what the expert would add to the worker."""


def place(
    routing: Mapping[int, ExpertIds],
    policy: PlacementPolicy,
    *,
    num_experts: int,
    num_workers: int,
    slots_per_worker: int,
    num_nodes: int = 1,
    num_groups: int = 1,
    batch_tokens: int = 64,
    effort: int = 1000,
    seed: int = 0,
) -> Placement:
    """Place every layer of `routing` (layer -> [N, K]).

    `eplb` is hierarchical if the num_groups groups of experts divide evenly over the num_nodes
    nodes. `search` tries `effort` changes a layer on batches of `batch_tokens` tokens. Raises
    ValueError if the slots cannot hold every expert, or are more than can be used.
    """
    in_turn = round_robin(
        moe_layers=sorted(routing),
        num_experts=num_experts,
        num_workers=num_workers,
        slots_per_worker=slots_per_worker,
    )
    if slots_per_worker > num_experts:
        raise ValueError(
            f"a worker has {slots_per_worker} expert slots a layer for {num_experts} experts"
        )
    if policy == "round_robin":
        return in_turn
    layers: dict[int, SlotExperts] = {}
    for layer, ids_NK in sorted(routing.items()):
        counts_E = expert_counts(ids_NK, num_experts)
        tables: list[SlotExperts] = []
        if policy != "coactivation":
            sizes = (counts_E, num_workers, slots_per_worker)
            tables.append(eplb(*sizes, num_nodes=num_nodes, num_groups=num_groups))
        if policy != "eplb":
            both_EE = coactivation(ids_NK, num_experts)
            tables.append(by_coactivation(counts_E, both_EE, num_workers, slots_per_worker))
        if policy == "search":
            starts = [in_turn.layers[layer], *tables]
            tables = [_search(starts, ids_NK, num_experts, batch_tokens, effort, seed)]
        [layers[layer]] = tables
    return Placement(num_workers=num_workers, slots_per_worker=slots_per_worker, layers=layers)


def place_without_replicas(
    ids_NK: ExpertIds,
    *,
    num_experts: int,
    num_workers: int,
    slots_per_worker: int,
    batch_tokens: int = 64,
    effort: int = 1000,
    seed: int = 0,
) -> SlotExperts:
    """The baseline of replication: each expert once, searched as long; spare slots stay empty.

    Spare slots still help: a worker may hold a few busy experts, and another many idle experts.
    """
    counts_E = expert_counts(ids_NK, num_experts)
    once_E = np.ones(num_experts, dtype=np.int64)
    starts = [
        _pack_by_load(counts_E, once_E, num_workers, slots)
        for slots in {slots_per_worker, -(-num_experts // num_workers)}
    ]
    padded = [
        np.pad(table, ((0, 0), (0, slots_per_worker - table.shape[1])), constant_values=EMPTY)
        for table in starts
    ]
    return _search(padded, ids_NK, num_experts, batch_tokens, effort, seed)


def replicate(counts_E: Counts, num_slots: int, most: int) -> Counts:
    """Replicas of each expert: first 1, then each further slot to the most tokens per replica.

    No expert gets more than `most`; ties go to the lowest expert.
    """
    num_replicas_E = np.ones(len(counts_E), dtype=np.int64)
    for _ in range(num_slots - len(counts_E)):
        load_E = np.where(num_replicas_E < most, counts_E / num_replicas_E, -1.0)
        num_replicas_E[load_E.argmax()] += 1
    return num_replicas_E


def by_coactivation(
    counts_E: Counts, coactivation_EE: Counts, num_workers: int, slots_per_worker: int
) -> SlotExperts:
    """Place the heaviest replicas first, each where it is least often chosen with the others."""

    def added(expert: int, worker: int, held: list[list[int]]) -> float:
        return float(coactivation_EE[expert, held[worker]].sum())

    num_replicas_E = replicate(counts_E, num_workers * slots_per_worker, num_workers)
    return _pack(counts_E, num_replicas_E, num_workers, slots_per_worker, added)


def eplb(
    counts_E: Counts,
    num_workers: int,
    slots_per_worker: int,
    *,
    num_nodes: int = 1,
    num_groups: int = 1,
) -> SlotExperts:
    """Balance tokens: groups over nodes first where they divide evenly, then within each node."""
    num_experts = len(counts_E)
    divides = num_groups % num_nodes == 0 == num_workers % num_nodes
    if num_nodes == 1 or not divides or num_experts % num_groups:
        return _eplb_node(counts_E, np.arange(num_experts), num_workers, slots_per_worker)
    per_node = num_workers // num_nodes
    group_size = num_experts // num_groups
    if num_experts // num_nodes > per_node * slots_per_worker:
        raise ValueError(
            f"{num_experts // num_nodes} experts of a node do not fit {per_node} workers with "
            f"{slots_per_worker} expert slots each"
        )
    group_counts = counts_E.reshape(num_groups, group_size).sum(axis=1)
    nodes = _pack_by_load(
        group_counts, np.ones(num_groups, dtype=np.int64), num_nodes, num_groups // num_nodes
    )
    return np.concatenate(
        [
            _eplb_node(
                counts_E,
                (np.sort(groups)[:, None] * group_size + np.arange(group_size)).ravel(),
                per_node,
                slots_per_worker,
            )
            for groups in nodes
        ]
    )


def _eplb_node(
    counts_E: Counts, experts: Counts, num_workers: int, slots_per_worker: int
) -> SlotExperts:
    """Replicate and pack these experts over the workers of one node."""
    slots_per_worker_used = min(slots_per_worker, len(experts))
    counts = counts_E[experts]
    num_replicas = replicate(counts, num_workers * slots_per_worker_used, num_workers)
    table_WC = np.full((num_workers, slots_per_worker), EMPTY, dtype=np.int32)
    table_WC[:, :slots_per_worker_used] = experts[
        _pack_by_load(counts, num_replicas, num_workers, slots_per_worker_used)
    ]
    return table_WC


def _pack_by_load(
    counts_E: Counts, num_replicas_E: Counts, num_workers: int, slots_per_worker: int
) -> SlotExperts:
    load_E = counts_E / num_replicas_E

    def added(expert: int, worker: int, held: list[list[int]]) -> float:
        return float(load_E[held[worker]].sum())

    return _pack(counts_E, num_replicas_E, num_workers, slots_per_worker, added)


def _pack(
    counts_E: Counts,
    num_replicas_E: Counts,
    num_workers: int,
    slots_per_worker: int,
    added: AddedCost,
) -> SlotExperts:
    """Fill all slots, the heaviest replicas first, each on the worker to which it adds least.

    If every worker with a free slot has a copy already, an expert of another worker moves to such a
    slot and leaves its own slot to the replica.
    """
    held: list[list[int]] = [[] for _ in range(num_workers)]
    replicas = np.repeat(np.arange(len(counts_E)), num_replicas_E)
    # Stable, so that equal loads come in the same order everywhere.
    heaviest_first = np.argsort(-(counts_E / num_replicas_E)[replicas], kind="stable")
    for expert in replicas[heaviest_first].tolist():
        free = [worker for worker in range(num_workers) if len(held[worker]) < slots_per_worker]
        fitting = [worker for worker in free if expert not in held[worker]]
        if fitting:
            held[min(fitting, key=lambda w: added(expert, w, held))].append(expert)
            continue
        # Such a move exists: a full worker without a copy holds more experts than a worker with a
        # free slot, hence some that the latter lacks.
        worker, moved, to = min(
            (
                (w, other, h)
                for w in range(num_workers)
                if expert not in held[w]
                for other in held[w]
                for h in free
                if other not in held[h]
            ),
            key=lambda move: added(expert, move[0], held) + added(move[1], move[2], held),
        )
        held[worker].remove(moved)
        held[worker].append(expert)
        held[to].append(moved)
    table_WC = np.full((num_workers, slots_per_worker), EMPTY, dtype=np.int32)
    for worker, experts in enumerate(held):
        table_WC[worker, : len(experts)] = experts
    return table_WC


def _search(
    starts: list[SlotExperts],
    ids_NK: ExpertIds,
    num_experts: int,
    batch_tokens: int,
    effort: int,
    seed: int,
) -> SlotExperts:
    """Try changes around the fullest workers of the batches; keep what lowers the mean a_max."""
    rng = np.random.default_rng(seed)
    active_BE = sample_batches(
        ids_NK, num_experts, num_tokens=batch_tokens, num_batches=_SEARCH_BATCHES, seed=seed
    )

    def judge(table_WC: SlotExperts) -> tuple[float, Counts, Counts, LayerReplicas]:
        replicas = _replicas(table_WC, num_experts)
        experts_BW, chosen_BE = activated(active_BE, replicas)
        # Among equal a_max, an even spread is better: it leaves room for the next change. The
        # factor is small, so that this only breaks ties.
        score = experts_BW.max(axis=1).mean() + 1e-3 * (experts_BW**2).mean()
        return float(score), experts_BW, chosen_BE, replicas

    table_WC = min(starts, key=lambda table: judge(table)[0]).copy()
    best = judge(table_WC)
    for _ in range(effort):
        _, experts_BW, chosen_BE, replicas = best
        changed = _relieve(table_WC, active_BE, experts_BW, chosen_BE, replicas, rng)
        if changed is None:
            continue
        candidate = judge(changed)
        if candidate[0] < best[0]:
            table_WC, best = changed, candidate
    return table_WC


def _relieve(
    table_WC: SlotExperts,
    active_BE: npt.NDArray[np.bool_],
    experts_BW: Counts,
    chosen_BE: Counts,
    replicas: LayerReplicas,
    rng: np.random.Generator,
) -> SlotExperts | None:
    """Copy or move an expert from the fullest worker of some batch to a worker that reads fewer.

    There it takes an empty slot, or the slot of an expert that the batch does not activate. That
    expert has other replicas, or moves the other way. None if the random draw finds no such change.
    """
    batch = int(rng.integers(len(active_BE)))
    load_W, active_E = experts_BW[batch], active_BE[batch]
    fullest = int(load_W.argmax())
    lighter = np.flatnonzero(load_W <= load_W.max() - 2)
    read_here_E = active_E & (
        replicas.workers_ER[np.arange(len(active_E)), chosen_BE[batch]] == fullest
    )
    if not len(lighter) or not read_here_E.any():
        return None
    worker = int(rng.choice(lighter))
    expert = int(rng.choice(np.flatnonzero(read_here_E)))
    slot_C = table_WC[worker]
    idle = np.flatnonzero((slot_C == EMPTY) | ~active_E[slot_C])
    if expert in slot_C or not len(idle):
        return None
    slot = int(rng.choice(idle))
    given_up = int(slot_C[slot])
    changed = table_WC.copy()
    changed[worker, slot] = expert
    has_spare = given_up != EMPTY and replicas.num_replicas_E[given_up] > 1
    # A copy changes how many replicas the two experts have, an exchange does not: both are tried.
    if not has_spare or rng.random() < 0.5:
        if given_up != EMPTY and given_up in table_WC[fullest]:
            return changed if has_spare else None
        changed[fullest, np.flatnonzero(table_WC[fullest] == expert)[0]] = given_up
    return changed


def _replicas(table_WC: SlotExperts, num_experts: int) -> LayerReplicas:
    num_workers, slots_per_worker = table_WC.shape
    placement = Placement(
        num_workers=num_workers, slots_per_worker=slots_per_worker, layers={0: table_WC.copy()}
    )
    return placement.replicas(0, num_experts)
