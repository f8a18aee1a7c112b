"""What an activation schedule chooses from: the replicas of a layer's experts, and the policies.

Shapes: E logical experts, R replicas of the expert that has most, N experts that have several,
W expert workers, C expert slots of a worker. A slot is numbered over all workers: worker * C + slot
of the worker.
"""

import enum
from dataclasses import dataclass

import torch

TOKEN_SWEEPS = 2
"""Times that the token policy goes over the replicated experts: the second knows all loads."""

MAX_GPU_WORKERS = 64
"""The GPU kernel keeps a set of workers in one int64."""

GOLDEN = 0x9E3779B9
"""2**32 divided by the golden ratio: multiples of it modulo 2**32 fill the range evenly."""


class Policy(enum.IntEnum):
    """How replicas are chosen; `janus_scheduler.activation` says what each does."""

    FIRST = 0
    RANDOM = 1
    EPLB = 2
    METRO = 3
    AEBS = 4
    EXACT = 5
    TOKEN = 6
    AUTO = 7


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaTable:
    """One layer's replicas on the device that schedules; made by `replica_table`."""

    num_workers: int
    """W."""
    slots_per_worker: int
    """C."""
    slots_ER: torch.Tensor
    """int32: the slots that hold an expert, ascending; -1: no more."""
    num_replicas_E: torch.Tensor
    """int32, at least 1."""
    replicated_N: torch.Tensor
    """int32: the experts that have several replicas, ascending."""
    slot_EW: torch.Tensor
    """int32: the slot of a worker that holds an expert; -1: none."""
    hosts_E: torch.Tensor
    """int64, for GPUs alone: bit w (of up to 64) says whether worker w holds the expert."""

    @property
    def has_choice(self) -> bool:
        """Whether any expert has several replicas."""
        return self.replicated_N.numel() > 0


def replica_table(
    slots_ER: torch.Tensor, *, num_workers: int, slots_per_worker: int
) -> ReplicaTable:
    """Build the table of slots_ER (int32, ascending in each row, padded with -1) on its device.

    Raises ValueError if an expert has no slot, a slot is beyond those of the workers, or there are
    more workers than a GPU can schedule over.
    """
    num_replicas_E = (slots_ER >= 0).sum(dim=1, dtype=torch.int32)
    if not bool((num_replicas_E > 0).all()):
        raise ValueError(f"expert {int(num_replicas_E.argmin())} has no expert slot")
    if slots_ER.device.type != "cpu" and num_workers > MAX_GPU_WORKERS:
        raise ValueError(
            f"a GPU schedules over up to {MAX_GPU_WORKERS} expert workers, not {num_workers}"
        )
    if int(slots_ER.max()) >= num_workers * slots_per_worker:
        raise ValueError(
            f"expert slot {int(slots_ER.max())} is beyond {num_workers} workers with "
            f"{slots_per_worker} slots each"
        )
    experts, replicas = torch.nonzero(slots_ER >= 0, as_tuple=True)
    slots = slots_ER[experts, replicas].to(torch.int32)
    slot_EW = slots.new_full((len(slots_ER), num_workers), -1)
    slot_EW[experts, slots // slots_per_worker] = slots
    bits_W = torch.ones(num_workers, dtype=torch.int64, device=slots_ER.device)
    bits_W <<= torch.arange(num_workers, device=slots_ER.device)
    return ReplicaTable(
        num_workers=num_workers,
        slots_per_worker=slots_per_worker,
        slots_ER=slots_ER.to(torch.int32).contiguous(),
        num_replicas_E=num_replicas_E,
        replicated_N=torch.nonzero(num_replicas_E > 1).flatten().to(torch.int32),
        slot_EW=slot_EW,
        hosts_E=torch.where(slot_EW >= 0, bits_W, 0).sum(dim=1),
    )
