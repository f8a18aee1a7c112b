"""Choose the replica that serves each activated expert.

Shapes: T tokens, K experts of a token, E logical experts, W expert workers, C expert slots of a
worker. Every expert worker computes the same choice from the same input, so that no message
is needed. The choice decides who computes, and changes a result by no more than the rounding of
partial sums. `janus_scheduler.activation` explains the policies; the tests compare with it.

Example: 2 workers of 2 slots, which hold experts [0, 1] and [2, 1]; a batch activates 0 and 1.
slots_ER = [[0, -1], [1, 3], [2, -1]]. Worker 0 alone holds expert 0, so that `exact` sends expert 1
to slot 3: tokens_WC = [[1, 0], [0, 1]] where `first` gives [[1, 1], [0, 0]].
"""

from dataclasses import dataclass

import torch

from janus_kernels.activation_schedule_cpu import schedule_into
from janus_kernels.replica_table import Policy, ReplicaTable
from janus_kernels.schedule_counts import ScheduleCounts, empty_counts


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationSchedule:
    """The replica choice of one batch in one layer, on the device of the ids."""

    slots_TK: torch.Tensor
    """int32: the slot that computes each token-expert pair, numbered over all workers."""
    counts: ScheduleCounts
    """int32: how much work the choice gives to each slot and worker."""


def activation_schedule(
    topk_ids_TK: torch.Tensor,
    table: ReplicaTable,
    policy: Policy,
    *,
    costs_ps: tuple[int, int] = (1, 1),
    seed: int = 0,
) -> ActivationSchedule:
    """Choose the slot of each pair of topk_ids_TK (int64, distinct in a row).

    `costs_ps` is for AUTO: picoseconds to read one more expert, and to compute one more pair.
    `seed` is for RANDOM: 32 bits. If no expert has replicas, all policies agree; then the
    cheapest, FIRST, runs.
    """
    if not table.has_choice:
        policy = Policy.FIRST
    topk_ids_TK = topk_ids_TK.contiguous()
    slots_TK = torch.empty(topk_ids_TK.shape, dtype=torch.int32, device=topk_ids_TK.device)
    counts = empty_counts(table)
    if topk_ids_TK.device.type == "cpu":
        schedule_into(
            int(policy),
            topk_ids_TK.numpy(),
            table.slots_ER.numpy(),
            table.num_replicas_E.numpy(),
            table.slots_per_worker,
            *costs_ps,
            seed,
            slots_TK.numpy(),
            *counts.numpy_parts(),
        )
    else:
        # Imported here because torch builds for CPUs come without triton.
        from janus_kernels.activation_schedule_triton import launch

        launch(topk_ids_TK, table, policy, costs_ps, seed, slots_TK, counts)
    return ActivationSchedule(slots_TK=slots_TK, counts=counts)
