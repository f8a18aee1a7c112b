"""What an activation schedule counts, packed into one tensor so that one addition sums it all.

Shapes: W expert workers, C expert slots of a worker. This module alone knows the order of the
parts inside the tensor; the kernels are handed the parts.
"""

from dataclasses import dataclass
from typing import Any

import torch

from janus_kernels.replica_table import ReplicaTable


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleCounts:
    """The counts of one batch in one layer, or their sums over many batches."""

    packed: torch.Tensor
    """Integers [W * C + W + 2]: all parts in a row."""
    num_workers: int
    """W."""
    slots_per_worker: int
    """C."""

    @property
    def tokens_WC(self) -> torch.Tensor:
        """Tokens of each slot."""
        tokens_S, *_ = self._tensors()
        return tokens_S.view(self.num_workers, self.slots_per_worker)

    @property
    def experts_W(self) -> torch.Tensor:
        """Distinct experts that each worker has to read."""
        _, experts_W, _, _ = self._tensors()
        return experts_W

    @property
    def a_max(self) -> torch.Tensor:
        """[1]: the experts of the worker that has to read most."""
        _, _, a_max, _ = self._tensors()
        return a_max

    @property
    def num_batches(self) -> torch.Tensor:
        """[1]: how many batches are counted; each schedule writes a 1."""
        *_, num_batches = self._tensors()
        return num_batches

    def numpy_parts(self) -> tuple[Any, Any, Any, Any]:
        """tokens_S (S = W * C), experts_W, a_max and num_batches as arrays on the same memory."""
        return _parts(self.packed.numpy(), self.num_workers)

    def _tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
        parts = _parts(self.packed, self.num_workers)
        return parts

    def add(self, other: "ScheduleCounts") -> None:
        """Add the counts of another batch to these, in place and without waiting for the device."""
        self.packed.add_(other.packed)

    def copy_to_cpu(self) -> "ScheduleCounts":
        """A copy that later additions do not change; waits for the device."""
        return ScheduleCounts(
            packed=self.packed.to("cpu", copy=True),
            num_workers=self.num_workers,
            slots_per_worker=self.slots_per_worker,
        )


def empty_counts(table: ReplicaTable) -> ScheduleCounts:
    """Counts of one batch for a kernel to fill: int32, uninitialised."""
    return _counts(
        table, torch.empty(_size(table), dtype=torch.int32, device=table.slots_ER.device)
    )


def zero_counts(table: ReplicaTable) -> ScheduleCounts:
    """Counts of no batch, to add to: int64, as they grow for as long as a worker lives."""
    return _counts(
        table, torch.zeros(_size(table), dtype=torch.int64, device=table.slots_ER.device)
    )


def _counts(table: ReplicaTable, packed: torch.Tensor) -> ScheduleCounts:
    return ScheduleCounts(
        packed=packed, num_workers=table.num_workers, slots_per_worker=table.slots_per_worker
    )


def _size(table: ReplicaTable) -> int:
    return table.num_workers * (table.slots_per_worker + 1) + 2


def _parts(packed: Any, num_workers: int) -> tuple[Any, Any, Any, Any]:
    """tokens_S, experts_W, a_max and num_batches of a packed tensor or numpy array."""
    experts_at = len(packed) - num_workers - 2
    return packed[:experts_at], packed[experts_at:-2], packed[-2:-1], packed[-1:]
