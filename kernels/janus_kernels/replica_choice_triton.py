"""How one program of a GPU chooses replicas: the parts of `activation_schedule_triton`.

Experts come one after another, as each choice depends on those before; all workers are looked at
together. Shapes as in `replica_table`; a set of workers is an int64 with a bit for each.
"""

import triton
import triton.language as tl

from janus_kernels.replica_table import TOKEN_SWEEPS

WHOLE_SHARE = tl.constexpr(1 << 16)
"""Upper bound of the share of an expert's last replica."""

_LARGE = tl.constexpr(1 << 30)
"""Above every load, worker and expert: stands for none."""
_TOKEN_SWEEPS = tl.constexpr(TOKEN_SWEEPS)


@triton.jit
def _or(left, right):
    return left | right


@triton.jit
def _least(values, where):
    """The smallest of the values picked out; _LARGE if none is."""
    return tl.min(tl.where(where, values, _LARGE), axis=0)


@triton.jit
def greedy(
    tokens_ptr,
    replicated_ptr,
    slot_ptr,
    loads_W,
    chosen_E,
    experts_E,
    workers_W,
    num_choices,
    ALL: tl.constexpr,
    W: tl.constexpr,
    W_PAD: tl.constexpr,
):
    """Give each activated expert, of ALL or of the replicated ones, to its least loaded worker."""
    for index in range(num_choices):
        expert = index
        if not ALL:
            expert = tl.load(replicated_ptr + index)
        is_active = tl.load(tokens_ptr + expert) > 0
        slot_W = tl.load(slot_ptr + expert * W + workers_W, workers_W < W, other=-1)
        # Load and worker in one number: its minimum is the lowest of the least loaded workers.
        best = _least(loads_W * W_PAD + workers_W, slot_W >= 0) % W_PAD
        loads_W += ((workers_W == best) & is_active).to(tl.int32)
        chosen_E = tl.where((experts_E == expert) & is_active, best, chosen_E)
    return loads_W, chosen_E


@triton.jit
def augment(loads_W, chosen_E, movable_E, hosts_E, experts_E, workers_W, floor):
    """Take experts off the fullest worker along shortest paths until no path helps.

    Ends early where the fullest worker is at the floor.
    """
    searching = tl.max(loads_W, axis=0) > floor
    while searching:
        most = tl.max(loads_W, axis=0)
        fullest = _least(workers_W, loads_W == most)
        visited = tl.full((), 1, tl.int64) << fullest
        frontier = visited
        depth_W = tl.where(workers_W == fullest, 0, -1)
        depth = 0
        end = _LARGE
        while (end == _LARGE) & (frontier != 0):
            leaving_E = movable_E & (((frontier >> chosen_E) & 1) != 0)
            reached = tl.reduce(tl.where(leaving_E, hosts_E, 0), 0, _or)
            frontier = reached & ~visited
            visited = visited | frontier
            depth += 1
            new_W = ((frontier >> workers_W) & 1) != 0
            depth_W = tl.where(new_W, depth, depth_W)
            end = _least(workers_W, new_W & (loads_W <= most - 2))
        searching = end != _LARGE
        if searching:
            loads_W = loads_W - (workers_W == fullest).to(tl.int32)
            loads_W = loads_W + (workers_W == end).to(tl.int32)
            # Back along the path: each expert on it moves one worker further.
            while end != fullest:
                depth -= 1
                bit = tl.full((), 1, tl.int64)
                level = tl.sum(tl.where(depth_W == depth, bit << workers_W, 0), axis=0)
                from_E = movable_E & (((level >> chosen_E) & 1) != 0)
                moved = _least(experts_E, from_E & (((hosts_E >> end) & 1) != 0))
                source = tl.sum(tl.where(experts_E == moved, chosen_E, 0), axis=0)
                chosen_E = tl.where(experts_E == moved, end, chosen_E)
                end = source
            searching = tl.max(loads_W, axis=0) > floor
    return loads_W, chosen_E


@triton.jit
def _fill_up(loads_W, is_host_W, amount):
    """Share out `amount` so that the lowest hosts become equal; see `activation_schedule_cpu`."""
    under_WW = (loads_W[None, :] <= loads_W[:, None]) & is_host_W[None, :]
    num_under_W = tl.sum(under_WW.to(tl.int32), axis=1)
    total_W = amount + tl.sum(tl.where(under_WW, loads_W[None, :], 0), axis=1)
    level = _least(total_W // tl.maximum(num_under_W, 1), is_host_W & (num_under_W > 0))
    poured_W = tl.where(is_host_W, tl.maximum(level - loads_W, 0), 0)
    left = amount - tl.sum(poured_W, axis=0)
    takes_W = (is_host_W & (loads_W <= level)).to(tl.int32)
    return poured_W + takes_W * (tl.cumsum(takes_W, axis=0) <= left).to(tl.int32)


@triton.jit
def split(
    tokens_ptr,
    shares_ptr,
    upper_ptr,
    replicated_ptr,
    slot_ptr,
    loads_W,
    experts_W,
    workers_W,
    num_replicated,
    W: tl.constexpr,
    R: tl.constexpr,
):
    """Give the tokens of each replicated expert to its least loaded workers; bound the shares.

    Returns the tokens and the activated experts of each worker.
    """
    for sweep in tl.static_range(_TOKEN_SWEEPS):
        for index in range(num_replicated):
            expert = tl.load(replicated_ptr + index)
            tokens = tl.load(tokens_ptr + expert)
            if tokens > 0:
                in_W = workers_W < W
                is_host_W = tl.load(slot_ptr + expert * W + workers_W, in_W, other=-1) >= 0
                if sweep > 0:
                    loads_W -= tl.load(shares_ptr + expert * W + workers_W, in_W, other=0)
                share_W = _fill_up(loads_W, is_host_W, tokens)
                loads_W += share_W
                if sweep < _TOKEN_SWEEPS - 1:
                    tl.store(shares_ptr + expert * W + workers_W, share_W, in_W)
                else:
                    experts_W += (share_W > 0).to(tl.int32)
                    upper_W = (tl.cumsum(share_W, axis=0).to(tl.int64) << 16) // tokens
                    replica_W = tl.cumsum(is_host_W.to(tl.int32), axis=0) - 1
                    tl.store(upper_ptr + expert * R + replica_W, upper_W.to(tl.int32), is_host_W)
        tl.debug_barrier()
    return loads_W.to(tl.int64), experts_W.to(tl.int64)
