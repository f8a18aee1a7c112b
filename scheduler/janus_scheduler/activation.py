"""Which replica serves each activated expert of a batch: the oracle of the activation schedule.

Decode reads weights: an MoE layer takes as long as the expert worker that has to read most distinct
experts, a_max of them. Where experts have replicas, choosing one for each activated expert moves
a_max. What runs on the expert workers is `janus_kernels.activation_schedule`; this is the plain
version that it must agree with, and what placement and planning count with.

Shapes: T tokens, K experts of a token, E logical experts, W expert workers, C expert slots of a
worker, R replicas of the expert that has most, B batches. A *slot* is numbered over all workers:
worker * C + slot of the worker.

Policies, all deterministic; ties go to the lowest worker, experts come in ascending order:

- `first`: the replica on the lowest worker. No balance.
- `random`: of each token-expert pair by a seeded hash of its position (SGLang's dynamic dispatch).
- `eplb`: of each pair by its position modulo the number of replicas (vLLM).
- `metro`: each activated expert to its least loaded worker, in one pass over all experts
  (arXiv 2512.09277, whose locks leave the order to chance).
- `aebs`: the same, after the experts that have no choice (arXiv 2512.13525, appendix A).
- `exact`: `aebs`, then augmenting moves out of the fullest worker until none helps: least a_max.
- `token`: splits the tokens of each expert over its replicas, so that workers compute for as many.
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
"""Times that `token` goes over the replicated experts: the second knows the loads of all."""

_GOLDEN = 0x9E3779B9
"""2**32 divided by the golden ratio: multiples of it modulo 2**32 fill the range evenly."""

Array = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationCosts:
    """What `auto` weighs, measured by `janus_server.experts.calibration`; only their ratio counts.

    Integers, so that no two workers differ by a rounding.
    """

    expert_ps: int
    """Time to read the weights of one more expert (beta), in picoseconds."""
    pair_ps: int
    """Time to compute one more token-expert pair (gamma), in picoseconds."""

    def __post_init__(self) -> None:
        if self.expert_ps < 1 or self.pair_ps < 1:
            raise ValueError(f"the costs of an expert and of a pair must be above 0, not {self}")


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
        """Of the worker that has to read most."""
        return int(self.experts_W.max())


def schedule(
    topk_ids_TK: npt.NDArray[np.integer],
    replicas: LayerReplicas,
    policy: SchedulePolicy,
    *,
    costs: ActivationCosts | None = None,
    seed: int = 0,
) -> ReplicaChoice:
    """Choose the replica of each pair; `costs` are needed by `auto`, `seed` is of `random`."""
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
    """What `exact` does with many batches at once: the same as `schedule` does with each.

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
    """What no schedule's a_max can be below, [B]: an even spread, or the experts with no choice."""
    even_B = -(-active_BE.sum(axis=1) // replicas.num_workers)
    floor_B: Array = np.maximum(even_B, _forced(active_BE, replicas).max(axis=1))
    return floor_B


def _by_position(ids_TK: Array, num_replicas_E: Array, policy: SchedulePolicy, seed: int) -> Array:
    """Index of the replica of each pair, by nothing but where the pair stands in the batch."""
    pair_TK = np.arange(ids_TK.size).reshape(ids_TK.shape)
    if policy == "random":
        pair_TK = _mix(pair_TK.astype(np.uint32), seed).astype(np.int64)
    return pair_TK % num_replicas_E[ids_TK]


def _mix(value: npt.NDArray[np.uint32], seed: int) -> npt.NDArray[np.uint32]:
    """The finisher of MurmurHash3 over a counter."""
    mixed = value * np.uint32(_GOLDEN) + np.uint32(seed & 0xFFFFFFFF)
    mixed = (mixed ^ (mixed >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    result: npt.NDArray[np.uint32] = mixed ^ (mixed >> np.uint32(16))
    return result


def _by_share(ids_TK: Array, tokens_ER: Array) -> Array:
    """Index of the replica of each pair, so that replica r gets about tokens_ER[e, r] tokens.

    Tokens are dealt out by their index times the golden ratio, which is even over any run of
    tokens and needs no count of the tokens before; whole shares are dealt out exactly.
    """
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
    """Activated experts of each worker that have their only replica there, [B, W]."""
    single_E = np.flatnonzero(replicas.num_replicas_E == 1)
    loads_BW = np.zeros((len(active_BE), replicas.num_workers), dtype=np.int64)
    for worker in range(replicas.num_workers):
        here = single_E[replicas.workers_ER[single_E, 0] == worker]
        loads_BW[:, worker] = active_BE[:, here].sum(axis=1)
    return loads_BW


def _greedy(
    active_BE: npt.NDArray[np.bool_], replicas: LayerReplicas, order: Sequence[int] | Array
) -> tuple[Array, Array]:
    """Give each activated expert of `order` to its least loaded worker, on top of the others.

    Returns loads_BW and chosen_BE: the index of the chosen replica, -1 for an idle expert.
    """
    forced_BE = active_BE.copy()
    forced_BE[:, order] = False
    loads_BW = _forced(forced_BE, replicas)
    chosen_BE = np.where(active_BE, 0, -1)
    for expert in order:
        batches = np.flatnonzero(active_BE[:, expert])
        hosts = replicas.workers_ER[expert, : replicas.num_replicas_E[expert]]
        best = loads_BW[batches[:, None], hosts].argmin(axis=1)
        chosen_BE[batches, expert] = best
        loads_BW[batches, hosts[best]] += 1
    return loads_BW, chosen_BE


def _augment(chosen_E: Array, loads_W: Array, replicas: LayerReplicas, floor: int) -> None:
    """Move experts along paths out of the fullest worker until none helps, or it is at the floor.

    Changes both arrays. A path hands an expert from worker to worker, each to one that holds a
    replica of it, and ends where at least two fewer are: the fullest loses one, the end gains one.
    When the fullest worker has no such path, those it can reach all have at least a_max - 1 experts
    that only they can serve, so that no schedule has a smaller a_max.
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
            frontier = sorted(reached)
            end = next((w for w in frontier if loads_W[w] <= loads_W[fullest] - 2), -1)
        if end < 0:
            return
        loads_W[fullest] -= 1
        loads_W[end] += 1
        while end != fullest:
            expert, index = came_by[end]
            end = int(replicas.workers_ER[expert, chosen_E[expert]])
            chosen_E[expert] = index


def _split(tokens_E: Array, replicas: LayerReplicas) -> Array:
    """Tokens of each replica, so that the workers' totals come out even."""
    tokens_ER = np.zeros(replicas.slots_ER.shape, dtype=np.int64)
    tokens_ER[:, 0] = np.where(replicas.num_replicas_E == 1, tokens_E, 0)
    loads_W = replicas.per_worker(tokens_ER)
    for _ in range(TOKEN_SWEEPS):
        for expert in np.flatnonzero((replicas.num_replicas_E > 1) & (tokens_E > 0)):
            num_replicas = replicas.num_replicas_E[expert]
            hosts = replicas.workers_ER[expert, :num_replicas]
            loads_W[hosts] -= tokens_ER[expert, :num_replicas]
            tokens_ER[expert, :num_replicas] = fill_up(loads_W[hosts], int(tokens_E[expert]))
            loads_W[hosts] += tokens_ER[expert, :num_replicas]
    return tokens_ER


def fill_up(loads_R: Array, amount: int) -> Array:
    """Pour `amount` onto the lowest loads until they stand level; what is left, lowest index first.

    The level is the least, over the loads taken as the highest still covered, of what they and all
    lower ones would come to.
    """
    under_RR = loads_R[None, :] <= loads_R[:, None]
    level = int(((amount + (under_RR * loads_R).sum(axis=1)) // under_RR.sum(axis=1)).min())
    poured_R = np.maximum(level - loads_R, 0)
    left = amount - int(poured_R.sum())
    poured_R[np.flatnonzero(loads_R <= level)[:left]] += 1
    return poured_R
