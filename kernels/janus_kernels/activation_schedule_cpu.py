"""The activation schedule in plain loops: the reference of the GPU kernel, and what CPUs run.

Compiled by numba. Policies as in `janus_scheduler.activation`, shapes as in `replica_table`, T
tokens, K experts of a token. Integers throughout, so that all backends agree to the last pair.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np

from janus_kernels.replica_table import GOLDEN, TOKEN_SWEEPS, Policy

_LOW_32 = 0xFFFFFFFF
"""Mask that keeps products to 32 bits, as uint32 does on a GPU: here integers have 64."""

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

Array = Any
"""A numpy array of integers, shaped as its name says."""


def _compiled(function: FunctionT) -> FunctionT:
    """Compile at the first call, and keep the result on disk where there is a place to write to.

    Without the global interpreter lock, so that heartbeats go on meanwhile.
    """
    try:
        return cast(FunctionT, numba.njit(cache=True, nogil=True)(function))
    except RuntimeError:  # neither beside this file nor in the user's cache
        return cast(FunctionT, numba.njit(nogil=True)(function))


@_compiled
def schedule_into(
    policy: int,
    ids_TK: Array,
    slots_ER: Array,
    num_replicas_E: Array,
    slots_per_worker: int,
    expert_ps: int,
    pair_ps: int,
    seed: int,
    slots_TK: Array,
    tokens_S: Array,
    experts_W: Array,
    a_max: Array,
    num_batches: Array,
) -> None:
    """Fill slots_TK and the parts of `ScheduleCounts`."""
    num_workers = len(experts_W)
    if policy in (Policy.FIRST, Policy.EPLB, Policy.RANDOM):
        _deal_by_position(policy, ids_TK, slots_ER, num_replicas_E, seed, slots_TK)
    else:
        tokens_E = np.empty(len(slots_ER), np.int64)
        _count(ids_TK, tokens_E)
        workers_ER = np.empty(slots_ER.shape, np.int64)
        for expert in range(len(slots_ER)):
            for index in range(slots_ER.shape[1]):
                workers_ER[expert, index] = slots_ER[expert, index] // slots_per_worker
        shares_ER = np.zeros(slots_ER.shape, np.int64)
        costs = (expert_ps, pair_ps)
        _share(policy, tokens_E, workers_ER, num_replicas_E, num_workers, costs, shares_ER)
        _deal(ids_TK, tokens_E, shares_ER, slots_ER, slots_TK)
    _count(slots_TK, tokens_S)
    for worker in range(num_workers):
        experts_W[worker] = 0
        for slot in range(worker * slots_per_worker, (worker + 1) * slots_per_worker):
            experts_W[worker] += tokens_S[slot] > 0
    a_max[0], num_batches[0] = _most(experts_W), 1


@_compiled
def _count(values_TK: Array, counts: Array) -> None:
    """Fill counts with how often each value occurs."""
    for value in range(len(counts)):
        counts[value] = 0
    for token in range(values_TK.shape[0]):
        for k in range(values_TK.shape[1]):
            counts[values_TK[token, k]] += 1


@_compiled
def _most(values: Array) -> int:
    """The largest value. A loop, like all else here: numba takes seconds to compile np.max."""
    most: int = values[0]
    for value in values:
        most = max(most, value)
    return most


@_compiled
def _deal_by_position(
    policy: int, ids_TK: Array, slots_ER: Array, num_replicas_E: Array, seed: int, slots_TK: Array
) -> None:
    """Choose the replica of each pair by nothing but where the pair stands in the batch."""
    num_tokens, top_k = ids_TK.shape
    for token in range(num_tokens):
        for k in range(top_k):
            expert = ids_TK[token, k]
            index = 0
            if policy != Policy.FIRST:
                index = token * top_k + k
                if policy == Policy.RANDOM:
                    index = _mix(index, seed)
                index %= num_replicas_E[expert]
            slots_TK[token, k] = slots_ER[expert, index]


@_compiled
def _mix(position: int, seed: int) -> int:
    """Hash a position to 32 bits: the final mixing of MurmurHash3, with its constants."""
    mixed = (position * GOLDEN + seed) & _LOW_32
    mixed = ((mixed ^ (mixed >> 16)) * 0x85EBCA6B) & _LOW_32
    mixed = ((mixed ^ (mixed >> 13)) * 0xC2B2AE35) & _LOW_32
    return mixed ^ (mixed >> 16)


@_compiled
def _share(
    policy: int,
    tokens_E: Array,
    workers_ER: Array,
    num_replicas_E: Array,
    num_workers: int,
    costs: tuple[int, int],
    shares_ER: Array,
) -> None:
    """Fill shares_ER, which comes zeroed: the tokens that each replica is to have."""
    if policy == Policy.TOKEN:
        _split(tokens_E, workers_ER, num_replicas_E, num_workers, shares_ER)
        return
    chosen_E = np.zeros(len(tokens_E), np.int64)
    loads_W = np.zeros(num_workers, np.int64)
    forced = 0
    if policy != Policy.METRO:
        forced = _force(tokens_E, workers_ER, num_replicas_E, loads_W)
    _greedy(tokens_E, workers_ER, num_replicas_E, policy != Policy.METRO, chosen_E, loads_W)
    if policy in (Policy.EXACT, Policy.AUTO):
        total = 0
        for load in loads_W:
            total += int(load)
        # No a_max is below an even spread, nor below the experts that one worker alone can serve.
        floor = max(-(-total // num_workers), forced)
        while _most(loads_W) > floor:
            if not _move_along_path(tokens_E, workers_ER, num_replicas_E, chosen_E, loads_W):
                break
    for expert in range(len(tokens_E)):
        shares_ER[expert, chosen_E[expert]] = tokens_E[expert]
    if policy == Policy.AUTO:
        _split_if_cheaper(tokens_E, workers_ER, num_replicas_E, num_workers, costs, shares_ER)


@_compiled
def _split_if_cheaper(
    tokens_E: Array,
    workers_ER: Array,
    num_replicas_E: Array,
    num_workers: int,
    costs: tuple[int, int],
    shares_ER: Array,
) -> None:
    """Replace whole shares by split ones where that costs the slowest worker less."""
    whole, most_tokens = _cost(shares_ER, workers_ER, num_replicas_E, num_workers, costs)
    # Splitting saves at most the computing of the fullest worker, and may add a read.
    if costs[1] * most_tokens <= costs[0]:
        return
    split_ER = np.zeros(shares_ER.shape, np.int64)
    _split(tokens_E, workers_ER, num_replicas_E, num_workers, split_ER)
    split, _ = _cost(split_ER, workers_ER, num_replicas_E, num_workers, costs)
    if split < whole:
        for expert in range(len(tokens_E)):
            for index in range(num_replicas_E[expert]):
                shares_ER[expert, index] = split_ER[expert, index]


@_compiled
def _cost(
    shares_ER: Array,
    workers_ER: Array,
    num_replicas_E: Array,
    num_workers: int,
    costs: tuple[int, int],
) -> tuple[int, int]:
    """Cost of the slowest worker, and tokens of the worker that has most."""
    cost_W = np.zeros(num_workers, np.int64)
    tokens_W = np.zeros(num_workers, np.int64)
    for expert in range(len(shares_ER)):
        for index in range(num_replicas_E[expert]):
            tokens = shares_ER[expert, index]
            if tokens > 0:
                worker = workers_ER[expert, index]
                cost_W[worker] += costs[0] + costs[1] * tokens
                tokens_W[worker] += tokens
    return _most(cost_W), _most(tokens_W)


@_compiled
def _force(tokens_E: Array, workers_ER: Array, num_replicas_E: Array, loads_W: Array) -> int:
    """Count the activated experts with one replica by worker; returns the largest count."""
    for expert in range(len(tokens_E)):
        if tokens_E[expert] > 0 and num_replicas_E[expert] == 1:
            loads_W[workers_ER[expert, 0]] += 1
    return _most(loads_W)


@_compiled
def _greedy(
    tokens_E: Array,
    workers_ER: Array,
    num_replicas_E: Array,
    forced_first: bool,
    chosen_E: Array,
    loads_W: Array,
) -> None:
    """Give each activated expert that is not yet counted to its least loaded worker."""
    for expert in range(len(tokens_E)):
        if tokens_E[expert] > 0 and (num_replicas_E[expert] > 1 or not forced_first):
            best = 0
            for index in range(1, num_replicas_E[expert]):
                if loads_W[workers_ER[expert, index]] < loads_W[workers_ER[expert, best]]:
                    best = index
            chosen_E[expert] = best
            loads_W[workers_ER[expert, best]] += 1


@_compiled
def _move_along_path(
    tokens_E: Array, workers_ER: Array, num_replicas_E: Array, chosen_E: Array, loads_W: Array
) -> bool:
    """Take an expert off the fullest worker along a shortest path; returns whether one exists."""
    fullest = 0
    depth_W = np.empty(len(loads_W), np.int64)
    for worker in range(len(loads_W)):
        depth_W[worker] = -1
        if loads_W[worker] > loads_W[fullest]:
            fullest = worker
    depth_W[fullest] = 0
    # The expert that reaches a worker, and the replica to choose for it.
    came_by_W2 = np.zeros((len(loads_W), 2), np.int64)
    depth, end = 0, -1
    while end < 0:
        if not _reach(tokens_E, workers_ER, num_replicas_E, chosen_E, depth, depth_W, came_by_W2):
            return False
        depth += 1
        # Downwards, so that the lowest worker that qualifies is the one that stays in `end`.
        for worker in range(len(loads_W) - 1, -1, -1):
            if depth_W[worker] == depth and loads_W[worker] <= loads_W[fullest] - 2:
                end = worker
    loads_W[fullest] -= 1
    loads_W[end] += 1
    # Back along the path: each expert on it moves one worker further.
    while end != fullest:
        expert, index = came_by_W2[end]
        end = workers_ER[expert, chosen_E[expert]]
        chosen_E[expert] = index
    return True


@_compiled
def _reach(
    tokens_E: Array,
    workers_ER: Array,
    num_replicas_E: Array,
    chosen_E: Array,
    depth: int,
    depth_W: Array,
    came_by_W2: Array,
) -> bool:
    """Mark the workers that experts of the workers at `depth` could move to; false if none."""
    grew = False
    for expert in range(len(tokens_E)):
        movable = tokens_E[expert] > 0 and num_replicas_E[expert] > 1
        if movable and depth_W[workers_ER[expert, chosen_E[expert]]] == depth:
            for index in range(num_replicas_E[expert]):
                worker = workers_ER[expert, index]
                if depth_W[worker] < 0:
                    grew = True
                    depth_W[worker] = depth + 1
                    came_by_W2[worker, 0], came_by_W2[worker, 1] = expert, index
    return grew


@_compiled
def _split(
    tokens_E: Array,
    workers_ER: Array,
    num_replicas_E: Array,
    num_workers: int,
    shares_ER: Array,
) -> None:
    """Give the tokens of each expert to its least loaded workers; shares_ER comes zeroed."""
    loads_W = np.zeros(num_workers, np.int64)
    for expert in range(len(tokens_E)):
        if num_replicas_E[expert] == 1:
            shares_ER[expert, 0] = tokens_E[expert]
            loads_W[workers_ER[expert, 0]] += tokens_E[expert]
    for _ in range(TOKEN_SWEEPS):
        for expert in range(len(tokens_E)):
            if num_replicas_E[expert] > 1 and tokens_E[expert] > 0:
                hosts_R = workers_ER[expert, : num_replicas_E[expert]]
                shares_R = shares_ER[expert]
                for index, worker in enumerate(hosts_R):
                    loads_W[worker] -= shares_R[index]
                _fill_up(loads_W, hosts_R, tokens_E[expert], shares_R)
                for index, worker in enumerate(hosts_R):
                    loads_W[worker] += shares_R[index]


@_compiled
def _fill_up(loads_W: Array, hosts_R: Array, amount: int, shares_R: Array) -> None:
    """Share out `amount` so that the lowest loads become equal, like water that finds its level.

    If the n lowest loads get everything, each ends at the mean of their sum and `amount`; the level
    is the smallest such mean. What rounding leaves over goes out by ascending worker.
    """
    level = _most(loads_W) + amount  # an upper bound
    for highest in hosts_R:
        num_under, total = 0, amount
        for worker in hosts_R:
            if loads_W[worker] <= loads_W[highest]:
                num_under += 1
                total += loads_W[worker]
        level = min(level, total // num_under)
    left = amount
    for index, worker in enumerate(hosts_R):
        shares_R[index] = max(level - loads_W[worker], 0)
        left -= shares_R[index]
    for index, worker in enumerate(hosts_R):
        if left > 0 and loads_W[worker] <= level:
            shares_R[index] += 1
            left -= 1


@_compiled
def _deal(
    ids_TK: Array, tokens_E: Array, shares_ER: Array, slots_ER: Array, slots_TK: Array
) -> None:
    """Choose the replica of each pair by the tokens' indices, so that each gets about its share."""
    upper_ER = np.zeros(shares_ER.shape, np.int64)
    for expert in range(len(tokens_E)):
        if tokens_E[expert] > 0:
            up_to = 0
            for index in range(shares_ER.shape[1]):
                up_to += shares_ER[expert, index]
                # In 1/65536 of the expert's tokens, which the GPU kernel keeps in 32 bits.
                upper_ER[expert, index] = (up_to << 16) // tokens_E[expert]
    for token in range(ids_TK.shape[0]):
        # Even over any run of tokens, so that no token needs to know how many came before it.
        place = ((token * GOLDEN) & _LOW_32) >> 16
        for k in range(ids_TK.shape[1]):
            expert = ids_TK[token, k]
            index = 0
            while place >= upper_ER[expert, index]:
                index += 1
            slots_TK[token, k] = slots_ER[expert, index]
