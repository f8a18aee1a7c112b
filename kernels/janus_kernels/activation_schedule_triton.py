"""The activation schedule on a GPU: one launch of one program for each layer; the host never waits.

Shapes as in `replica_table`; T tokens, K experts of a token, P = T * K token-expert pairs; `_PAD`
marks powers of two that cover a dimension. The program counts the tokens of each expert, lets
`replica_choice_triton` choose, and writes the slot of each pair. A barrier stands wherever threads
read what others have written to global memory. The reference is `activation_schedule_cpu`.
"""

import torch
import triton
import triton.language as tl

from janus_kernels.replica_choice_triton import WHOLE_SHARE, augment, greedy, split
from janus_kernels.replica_table import GOLDEN, Policy, ReplicaTable
from janus_kernels.schedule_counts import ScheduleCounts

_MAX_BLOCK = 4096
"""Pairs that the program handles at a time, at most."""
_GOLDEN = tl.constexpr(GOLDEN)
_FIRST = tl.constexpr(int(Policy.FIRST))
_RANDOM = tl.constexpr(int(Policy.RANDOM))
_EPLB = tl.constexpr(int(Policy.EPLB))
_METRO = tl.constexpr(int(Policy.METRO))
_EXACT = tl.constexpr(int(Policy.EXACT))
_TOKEN = tl.constexpr(int(Policy.TOKEN))
_AUTO = tl.constexpr(int(Policy.AUTO))


@triton.jit
def _mix(pair, seed):
    """Hash a pair's position to 32 bits: the final mixing of MurmurHash3, with its constants."""
    mixed = pair.to(tl.uint32) * _GOLDEN + seed.to(tl.uint32)
    mixed = (mixed ^ (mixed >> 16)) * 0x85EBCA6B
    mixed = (mixed ^ (mixed >> 13)) * 0xC2B2AE35
    return (mixed ^ (mixed >> 16)).to(tl.int64)


@triton.jit
def _count_tokens(
    ids_ptr, num_pairs, tokens_ptr, experts_E, in_E, E_PAD: tl.constexpr, BLOCK: tl.constexpr
):
    """Write and return the tokens of each expert."""
    tokens_E = tl.zeros([E_PAD], tl.int32)
    for start in range(0, num_pairs, BLOCK):
        pairs = start + tl.arange(0, BLOCK)
        ids = tl.load(ids_ptr + pairs, pairs < num_pairs, other=0).to(tl.int32)
        tokens_E += tl.histogram(ids, E_PAD, mask=pairs < num_pairs)
    tl.store(tokens_ptr + experts_E, tokens_E, in_E)
    return tokens_E


@triton.jit
def _give_all_to_the_first(upper_ptr, experts_E, in_E, R: tl.constexpr):
    """Bound the shares as if the first replica had all tokens; `split` overwrites some."""
    for replica in tl.static_range(R):
        tl.store(upper_ptr + experts_E * R + replica, WHOLE_SHARE, in_E)
    tl.debug_barrier()


@triton.jit
def _per_worker(values_E, worker_E, workers_W):
    """Sum the experts' values over the worker of each."""
    on_EW = worker_E[:, None] == workers_W[None, :]
    return tl.sum(tl.where(on_EW, values_E[:, None], 0), axis=0)


@triton.jit
def _rewrite(
    ids_ptr,
    slots_ptr,
    num_replicas_ptr,
    chosen_ptr,
    upper_ptr,
    out_slots_ptr,
    slot_tokens_ptr,
    num_pairs,
    seed,
    use_split,
    POLICY: tl.constexpr,
    WHOLE: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    S_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the slot of each pair, and the tokens of each slot."""
    tl.debug_barrier()
    tokens_S = tl.zeros([S_PAD], tl.int32)
    for start in range(0, num_pairs, BLOCK):
        pairs = start + tl.arange(0, BLOCK)
        mask = pairs < num_pairs
        ids = tl.load(ids_ptr + pairs, mask, other=0).to(tl.int32)
        replica = tl.zeros([BLOCK], tl.int32)
        if (POLICY == _EPLB) | (POLICY == _RANDOM):
            position = pairs.to(tl.int64)
            if POLICY == _RANDOM:
                position = _mix(pairs, seed)
            replica = (position % tl.load(num_replicas_ptr + ids, mask, other=1)).to(tl.int32)
        if use_split:
            place = ((((pairs // K).to(tl.int64) * _GOLDEN) & 0xFFFFFFFF) >> 16).to(tl.int32)
            for below in tl.static_range(R):
                upper = tl.load(upper_ptr + ids * R + below, mask, other=WHOLE_SHARE)
                replica += (place >= upper).to(tl.int32)
        slots = tl.load(slots_ptr + ids * R + replica, mask, other=0)
        if WHOLE:
            if not use_split:
                slots = tl.load(chosen_ptr + ids, mask, other=0)
        tl.store(out_slots_ptr + pairs, slots, mask)
        tokens_S += tl.histogram(slots, S_PAD, mask=mask)
    slots_S = tl.arange(0, S_PAD)
    tl.store(slot_tokens_ptr + slots_S, tokens_S, slots_S < S)


@triton.jit
def _count_experts(
    slot_tokens_ptr,
    worker_experts_ptr,
    a_max_ptr,
    num_batches_ptr,
    workers_W,
    W: tl.constexpr,
    C: tl.constexpr,
    C_PAD: tl.constexpr,
):
    """Write the rest of `ScheduleCounts` from the tokens of the slots."""
    tl.debug_barrier()
    columns_C = tl.arange(0, C_PAD)
    in_WC = (workers_W[:, None] < W) & (columns_C[None, :] < C)
    offsets_WC = workers_W[:, None] * C + columns_C[None, :]
    read_WC = tl.load(slot_tokens_ptr + offsets_WC, in_WC, other=0) > 0
    experts_W = tl.sum(read_WC.to(tl.int32), axis=1)
    tl.store(worker_experts_ptr + workers_W, experts_W, workers_W < W)
    tl.store(a_max_ptr, tl.max(experts_W, axis=0))
    tl.store(num_batches_ptr, 1)


# Triton compiles anew for arguments that are 1 or divisible by 16; these change with every step.
@triton.jit(do_not_specialize=["num_pairs", "num_replicated", "expert_ps", "pair_ps", "seed"])
def _schedule_kernel(
    ids_ptr,  # int64 [P]
    slots_ptr,  # int32 [E, R]
    num_replicas_ptr,  # int32 [E]
    replicated_ptr,  # int32 [N]
    slot_ptr,  # int32 [E, W]
    hosts_ptr,  # int64 [E]
    scratch_ptr,  # int32 [E + E + E * R + E * W]
    out_slots_ptr,  # int32 [P]
    slot_tokens_ptr,  # int32 [W * C], and the rest of `ScheduleCounts`:
    worker_experts_ptr,  # int32 [W]
    a_max_ptr,  # int32 [1]
    num_batches_ptr,  # int32 [1]
    num_pairs,
    num_replicated,
    expert_ps,
    pair_ps,
    seed,
    POLICY: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    E_PAD: tl.constexpr,
    W_PAD: tl.constexpr,
    C_PAD: tl.constexpr,
    S_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    experts_E = tl.arange(0, E_PAD)
    workers_W = tl.arange(0, W_PAD)
    in_E = experts_E < E
    tokens_ptr = scratch_ptr
    chosen_ptr = scratch_ptr + E
    upper_ptr = scratch_ptr + 2 * E
    shares_ptr = upper_ptr + E * R
    COUNTS: tl.constexpr = (POLICY != _FIRST) & (POLICY != _EPLB) & (POLICY != _RANDOM)
    WHOLE: tl.constexpr = COUNTS & (POLICY != _TOKEN)
    use_split = POLICY == _TOKEN
    if COUNTS:
        tokens_E = _count_tokens(ids_ptr, num_pairs, tokens_ptr, experts_E, in_E, E_PAD, BLOCK)
        num_replicas_E = tl.load(num_replicas_ptr + experts_E, in_E, other=1)
        home_E = tl.load(slots_ptr + experts_E * R, in_E, other=0) // C
        forced_E = (tokens_E > 0) & (num_replicas_E == 1)
        forced_W = tl.histogram(home_E, W_PAD, mask=forced_E)
        tl.debug_barrier()
    if WHOLE:
        loads_W = tl.zeros([W_PAD], tl.int32) if POLICY == _METRO else forced_W
        loads_W, chosen_E = greedy(
            tokens_ptr,
            replicated_ptr,
            slot_ptr,
            loads_W,
            home_E,
            experts_E,
            workers_W,
            E if POLICY == _METRO else num_replicated,
            POLICY == _METRO,
            W,
            W_PAD,
        )
        if (POLICY == _EXACT) | (POLICY == _AUTO):
            movable_E = (tokens_E > 0) & (num_replicas_E > 1) & in_E
            hosts_E = tl.load(hosts_ptr + experts_E, in_E, other=0)
            floor = tl.maximum(tl.cdiv(tl.sum(loads_W, axis=0), W), tl.max(forced_W, axis=0))
            loads_W, chosen_E = augment(
                loads_W, chosen_E, movable_E, hosts_E, experts_E, workers_W, floor
            )
        slot_E = tl.load(slot_ptr + experts_E * W + chosen_E, in_E)
        tl.store(chosen_ptr + experts_E, slot_E, in_E)
    if (POLICY == _TOKEN) | (POLICY == _AUTO):
        forced_tokens_W = _per_worker(tl.where(forced_E, tokens_E, 0), home_E, workers_W)
        tries_split = POLICY == _TOKEN
        if POLICY == _AUTO:
            tokens_W = _per_worker(tokens_E, chosen_E, workers_W).to(tl.int64)
            whole = tl.max(expert_ps * loads_W.to(tl.int64) + pair_ps * tokens_W, axis=0)
            # Splitting saves at most the computing of the fullest worker, and may add a read.
            tries_split = pair_ps * tl.max(tokens_W, axis=0) > expert_ps
            use_split = tries_split
        if tries_split:
            _give_all_to_the_first(upper_ptr, experts_E, in_E, R)
            split_tokens_W, split_experts_W = split(
                tokens_ptr,
                shares_ptr,
                upper_ptr,
                replicated_ptr,
                slot_ptr,
                forced_tokens_W,
                forced_W,
                workers_W,
                num_replicated,
                W,
                R,
            )
            if POLICY == _AUTO:
                cost_W = expert_ps * split_experts_W + pair_ps * split_tokens_W
                use_split = tl.max(cost_W, axis=0) < whole
    _rewrite(
        ids_ptr,
        slots_ptr,
        num_replicas_ptr,
        chosen_ptr,
        upper_ptr,
        out_slots_ptr,
        slot_tokens_ptr,
        num_pairs,
        seed,
        use_split,
        POLICY,
        WHOLE,
        K,
        R,
        W * C,
        S_PAD,
        BLOCK,
    )
    _count_experts(
        slot_tokens_ptr, worker_experts_ptr, a_max_ptr, num_batches_ptr, workers_W, W, C, C_PAD
    )


def constants(
    table: ReplicaTable, policy: Policy, *, num_tokens: int, top_k: int
) -> dict[str, int]:
    """The compile-time values of a launch, `num_warps` among them."""
    num_experts, num_replicas = table.slots_ER.shape
    num_workers, num_slots = table.num_workers, table.slots_per_worker
    block = min(_MAX_BLOCK, max(128, triton.next_power_of_2(num_tokens * top_k)))
    return {
        "POLICY": int(policy),
        "K": top_k,
        "E": num_experts,
        "R": num_replicas,
        "W": num_workers,
        "C": num_slots,
        "E_PAD": triton.next_power_of_2(num_experts),
        "W_PAD": triton.next_power_of_2(num_workers),
        "C_PAD": triton.next_power_of_2(num_slots),
        "S_PAD": triton.next_power_of_2(num_workers * num_slots),
        "BLOCK": block,
        "num_warps": 4 if block <= 1024 else 16,  # at most 8 pairs a thread
    }


def launch(
    topk_ids_TK: torch.Tensor,
    table: ReplicaTable,
    policy: Policy,
    costs_ps: tuple[int, int],
    seed: int,
    slots_TK: torch.Tensor,
    counts: ScheduleCounts,
) -> None:
    """Fill slots_TK and counts, as `ActivationSchedule` has them, for topk_ids_TK (contiguous)."""
    num_tokens, top_k = topk_ids_TK.shape
    num_experts, num_replicas = table.slots_ER.shape
    scratch = torch.empty(
        num_experts * (2 + num_replicas + table.num_workers),
        dtype=torch.int32,
        device=topk_ids_TK.device,
    )
    _schedule_kernel[(1,)](
        topk_ids_TK,
        table.slots_ER,
        table.num_replicas_E,
        table.replicated_N,
        table.slot_EW,
        table.hosts_E,
        scratch,
        slots_TK,
        counts.tokens_WC,
        counts.experts_W,
        counts.a_max,
        counts.num_batches,
        num_tokens * top_k,
        table.replicated_N.numel(),
        *costs_ps,
        seed,
        **constants(table, policy, num_tokens=num_tokens, top_k=top_k),
    )
