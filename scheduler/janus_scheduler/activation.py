"""Which replica serves each activated expert of a batch: the oracle of the activation schedule.

Decode reads weights: an MoE layer takes as long as the expert worker that has to read most distinct
experts, a_max of them. Where experts have replicas, choosing one for each activated expert moves
a_max. Expert workers run `janus_kernels.activation_schedule`; this is the plain version that it
must agree with, and the one that placement and planning use.

Shapes: T tokens, K experts of a token, E logical experts, W expert workers, C expert slots of a
worker, R replicas of the expert that has most, B batches. A *slot* is numbered over all workers:
worker * C + slot of the worker.

Policies, all deterministic; ties go to the lowest worker, experts come in ascending order:

- `first`: the replica on the lowest worker. No balance.
- `random`: each token-expert pair by a seeded hash of its position (SGLang's dynamic dispatch).
- `eplb`: each pair by its position modulo the number of replicas (vLLM).
- `metro`: each activated expert to its least loaded worker, in one pass over all experts
  (arXiv 2512.09277, whose locks leave the order to chance).
- `aebs`: the same, but experts with a single replica first (arXiv 2512.13525, appendix A).
- `exact`: `aebs`, then moves experts off the fullest worker as long as that lowers a_max: no
  choice has a smaller one.
- `token`: splits the tokens of each expert over its replicas, so that workers have equally many.
- `auto`: `exact` or `token`, whichever costs the slowest worker less by `ActivationCosts`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from janus_scheduler.placement import LayerReplicas

SchedulePolicy = Literal["auto", "exact", "aebs", "metro", "token", "eplb", "random", "first"]
POLICIES: tuple[SchedulePolicy, ...] = get_args(SchedulePolicy)

TOKEN_SWEEPS = 2
"""Times that `token` goes over the replicated experts: the second knows all loads."""

_GOLDEN = 0x9E3779B9
"""2**32 divided by the golden ratio: multiples of it modulo 2**32 fill the range evenly."""

MAX_COST_PS = 10**12
"""A second: sums over the tokens of a batch fit an int64."""

Array = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationCosts:
    """What `auto` weighs, measured by `janus_server.experts.calibration`; only the ratio matters.

    Integers, so that rounding cannot make two workers disagree.
    """

    expert_ps: int
    """Time to read the weights of one more expert (beta), in picoseconds."""
    pair_ps: int
    """Time to compute one more token-expert pair (gamma), in picoseconds."""

    def __post_init__(self) -> None:
        if not (1 <= self.expert_ps <= MAX_COST_PS and 1 <= self.pair_ps <= MAX_COST_PS):
            raise ValueError(
                f"the costs of an expert and of a pair must be from 1 to {MAX_COST_PS} ps, not "
                f"{self.expert_ps} and {self.pair_ps}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheduling:
    """What the expert workers of an epoch agree on."""

    policy: SchedulePolicy
    costs: ActivationCosts


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReplicaChoice:
    """The replica choice of one batch in one layer."""

    slots_TK: Array
    """Slot that computes each token-expert pair."""
    tokens_WC: Array
    """Tokens of each slot."""

    @property
    def experts_W(self) -> Array:
        """Distinct experts that each worker has to read."""
        counts_W: Array = (self.tokens_WC > 0).sum(axis=1)
        return counts_W

    @property
    def a_max(self) -> int:
        """Distinct experts of the worker that has to read most."""
        return int(self.experts_W.max())


def schedule(
    topk_ids_TK: npt.NDArray[np.integer],
    replicas: LayerReplicas,
    policy: SchedulePolicy,
    *,
    costs: ActivationCosts | None = None,
    seed: int = 0,
) -> ReplicaChoice:
    """Choose the replica of each pair; `auto` needs `costs`, `random` uses `seed`."""
    ids_TK = topk_ids_TK.astype(np.int64)
    if policy in ("random", "eplb"):
        chosen_TK = _by_position(ids_TK, replicas.num_replicas_E, policy, seed)
    else:
        tokens_E = np.bincount(ids_TK.ravel(), minlength=replicas.num_experts)
        chosen_TK = _by_share(ids_TK, _shares(tokens_E, replicas, policy, costs))
    slots_TK = replicas.slots_ER[ids_TK, chosen_TK].astype(np.int64)
    num_slots = replicas.num_workers * replicas.slots_per_worker
    tokens_S = np.bincount(slots_TK.ravel(), minlength=num_slots)
    return ReplicaChoice(
        slots_TK=slots_TK, tokens_WC=tokens_S.reshape(-1, replicas.slots_per_worker)
    )


def activated(active_BE: npt.NDArray[np.bool_], replicas: LayerReplicas) -> tuple[Array, Array]:
    """Run `exact` on many batches at once; the result is that of `schedule` on each.

    active_BE says which experts a batch activates. Returns experts_BW, the distinct experts of each
    worker, and chosen_BE, the index of the chosen replica, -1 for an idle expert.
    """
    choosy = np.flatnonzero(replicas.num_replicas_E > 1)
    loads_BW, chosen_BE = _greedy(active_BE, replicas, choosy)
    floor_B = floor(active_BE, replicas)
    for batch in np.flatnonzero(loads_BW.max(axis=1) > floor_B):
        _augment(chosen_BE[batch], loads_BW[batch], replicas, int(floor_B[batch]))
    return loads_BW, chosen_BE


def floor(active_BE: npt.NDArray[np.bool_], replicas: LayerReplicas) -> npt.NDArray[np.int64]:
    """A lower bound of a_max, [B]: an even spread, or the single-replica experts of one worker."""
    even_B = -(-active_BE.sum(axis=1) // replicas.num_workers)
    floor_B: Array = np.maximum(even_B, _forced(active_BE, replicas).max(axis=1))
    return floor_B


def _by_position(ids_TK: Array, num_replicas_E: Array, policy: SchedulePolicy, seed: int) -> Array:
    """Index of the replica of each pair, chosen by the pair's position in the batch alone."""
    pair_TK = np.arange(ids_TK.size).reshape(ids_TK.shape)
    if policy == "random":
        pair_TK = _mix(pair_TK.astype(np.uint32), seed).astype(np.int64)
    return pair_TK % num_replicas_E[ids_TK]


def _mix(value: npt.NDArray[np.uint32], seed: int) -> npt.NDArray[np.uint32]:
    """Hash positions to 32 bits: the final mixing of MurmurHash3, with its constants."""
    mixed = value * np.uint32(_GOLDEN) + np.uint32(seed & 0xFFFFFFFF)
    mixed = (mixed ^ (mixed >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    result: npt.NDArray[np.uint32] = mixed ^ (mixed >> np.uint32(16))
    return result


def _by_share(ids_TK: Array, tokens_ER: Array) -> Array:
    """Index of the replica of each pair, so that replica r gets about tokens_ER[e, r] tokens.

    A token's index times the golden ratio, modulo 1, decides: that is even over any run of tokens,
    and no token needs to know how many came before it. A replica whose share is all gets all.
    """
    # Both in 1/65536, as the GPU kernel keeps them in 32 bits.
    place_T = (np.arange(ids_TK.shape[0]) * _GOLDEN & 0xFFFFFFFF) >> 16
    total_E1 = np.maximum(tokens_ER.sum(axis=1, keepdims=True), 1)
    upper_ER = (tokens_ER.cumsum(axis=1) << 16) // total_E1
    chosen_TK: Array = (place_T[:, None, None] >= upper_ER[ids_TK]).sum(axis=2)
    return chosen_TK


def _shares(
    tokens_E: Array,
    replicas: LayerReplicas,
    policy: SchedulePolicy,
    costs: ActivationCosts | None,
) -> Array:
    """int64 [E, R]: the tokens of each activated expert that each of its replicas is to have."""
    if policy == "token":
        return _split(tokens_E, replicas)
    if policy != "auto":
        return _whole(tokens_E, replicas, policy)
    assert costs is not None, "auto needs costs"
    whole_ER = _whole(tokens_E, replicas, "exact")
    tokens_W = replicas.per_worker(whole_ER)
    # Splitting saves at most the computing of the fullest worker, and may add a read.
    if costs.pair_ps * tokens_W.max() <= costs.expert_ps:
        return whole_ER
    split_ER = _split(tokens_E, replicas)
    return min((whole_ER, split_ER), key=lambda tokens_ER: _cost(tokens_ER, replicas, costs))


def _cost(tokens_ER: Array, replicas: LayerReplicas, costs: ActivationCosts) -> int:
    experts_W = replicas.per_worker(tokens_ER > 0)
    cost_W = costs.expert_ps * experts_W + costs.pair_ps * replicas.per_worker(tokens_ER)
    return int(cost_W.max())


def _whole(tokens_E: Array, replicas: LayerReplicas, policy: SchedulePolicy) -> Array:
    """All tokens of an expert to one replica, by `policy`."""
    active_1E = (tokens_E > 0)[None]
    chosen_1E = np.zeros_like(tokens_E)[None]
    if policy == "metro":
        _, chosen_1E = _greedy(active_1E, replicas, np.arange(replicas.num_experts))
    elif policy == "aebs":
        _, chosen_1E = _greedy(active_1E, replicas, np.flatnonzero(replicas.num_replicas_E > 1))
    elif policy == "exact":
        _, chosen_1E = activated(active_1E, replicas)
    tokens_ER = np.zeros(replicas.slots_ER.shape, dtype=np.int64)
    experts = np.flatnonzero(active_1E[0])
    tokens_ER[experts, chosen_1E[0, experts]] = tokens_E[experts]
    return tokens_ER


def _forced(active_BE: npt.NDArray[np.bool_], replicas: LayerReplicas) -> Array:
    """For each worker, the activated experts whose only replica it holds, [B, W]."""
    single_E = np.flatnonzero(replicas.num_replicas_E == 1)
    loads_BW = np.zeros((len(active_BE), replicas.num_workers), dtype=np.int64)
    for worker in range(replicas.num_workers):
        here = single_E[replicas.workers_ER[single_E, 0] == worker]
        loads_BW[:, worker] = active_BE[:, here].sum(axis=1)
    return loads_BW


def _greedy(
    active_BE: npt.NDArray[np.bool_], replicas: LayerReplicas, order: Sequence[int] | Array
) -> tuple[Array, Array]:
    """Give each activated expert of `order` to its least loaded worker, after all other experts.

    Returns loads_BW and chosen_BE: the index of the chosen replica, -1 for an idle expert.
    """
    forced_BE = active_BE.copy()
    forced_BE[:, order] = False
    loads_BW = _forced(forced_BE, replicas)
    chosen_BE = np.where(active_BE, 0, -1)
    # Experts one by one, as each choice depends on those before; all batches together.
    for expert in order:
        batches = np.flatnonzero(active_BE[:, expert])
        hosts = replicas.workers_ER[expert, : replicas.num_replicas_E[expert]]
        best = loads_BW[batches[:, None], hosts].argmin(axis=1)
        chosen_BE[batches, expert] = best
        loads_BW[batches, hosts[best]] += 1
    return loads_BW, chosen_BE


def _augment(chosen_E: Array, loads_W: Array, replicas: LayerReplicas, floor: int) -> None:
    """Move experts off the fullest worker, along paths, until no path helps or it is at the floor.

    Changes both arrays. On a path each worker hands an expert to the next, which holds a replica of
    it. The path ends at a worker with at least two experts fewer than the fullest: the fullest
    loses one expert, the last gains one, those between keep their number. If the fullest worker has
    no such path, the workers that it can reach have at least a_max - 1 experts each, all of which
    they alone can serve: then no schedule has a smaller a_max.
    """
    movable: list[int] = np.flatnonzero((chosen_E >= 0) & (replicas.num_replicas_E > 1)).tolist()
    while loads_W.max() > floor:
        fullest = int(loads_W.argmax())
        # Breadth first: came_by[w] is the expert that reaches w, and the replica to choose for it.
        came_by: dict[int, tuple[int, int]] = {}
        frontier, end = [fullest], -1
        while frontier and end < 0:
            reached: dict[int, tuple[int, int]] = {}
            for expert in movable:
                if replicas.workers_ER[expert, chosen_E[expert]] in frontier:
                    for index in range(replicas.num_replicas_E[expert]):
                        worker = int(replicas.workers_ER[expert, index])
                        if worker != fullest and worker not in came_by:
                            reached.setdefault(worker, (expert, index))
            came_by |= reached
            frontier = sorted(reached)  # so that the lowest worker that qualifies is the end
            end = next((w for w in frontier if loads_W[w] <= loads_W[fullest] - 2), -1)
        if end < 0:
            return
        loads_W[fullest] -= 1
        loads_W[end] += 1
        # Back along the path: each expert on it moves one worker further.
        while end != fullest:
            expert, index = came_by[end]
            end = int(replicas.workers_ER[expert, chosen_E[expert]])
            chosen_E[expert] = index


def _split(tokens_E: Array, replicas: LayerReplicas) -> Array:
    """Tokens of each replica, such that the workers' totals are nearly equal."""
    tokens_ER = np.zeros(replicas.slots_ER.shape, dtype=np.int64)
    tokens_ER[:, 0] = np.where(replicas.num_replicas_E == 1, tokens_E, 0)
    loads_W = replicas.per_worker(tokens_ER)
    for _ in range(TOKEN_SWEEPS):
        for expert in np.flatnonzero((replicas.num_replicas_E > 1) & (tokens_E > 0)):
            num_replicas = replicas.num_replicas_E[expert]
            hosts = replicas.workers_ER[expert, :num_replicas]
            # Taken out and shared out again: in the second sweep, the loads of all are known.
            loads_W[hosts] -= tokens_ER[expert, :num_replicas]
            tokens_ER[expert, :num_replicas] = fill_up(loads_W[hosts], int(tokens_E[expert]))
            loads_W[hosts] += tokens_ER[expert, :num_replicas]
    return tokens_ER


def fill_up(loads_R: Array, amount: int) -> Array:
    """Share out `amount` so that the lowest loads become equal, like water that finds its level.

    If the n lowest loads get everything, each ends at the mean of their sum and `amount`; the level
    is the smallest such mean. What rounding leaves over goes to the lowest indices.
    """
    under_RR = loads_R[None, :] <= loads_R[:, None]
    level = int(((amount + (under_RR * loads_R).sum(axis=1)) // under_RR.sum(axis=1)).min())
    poured_R = np.maximum(level - loads_R, 0)
    left = amount - int(poured_R.sum())
    poured_R[np.flatnonzero(loads_R <= level)[:left]] += 1
    return poured_R
