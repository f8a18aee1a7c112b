"""Which expert slot of which worker holds which logical expert, layer by layer.

Shapes: W expert workers, C expert slots of a worker and layer, E logical experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

EMPTY = -1
"""The expert of a slot that holds none."""

SlotExperts = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerReplicas:
    """The replicas of each expert of one layer. R: the largest number of replicas of an expert."""

    num_workers: int
    slots_per_worker: int
    slots_ER: SlotExperts
    """int32 [E, R]: slots that hold the expert, ascending, hence by ascending worker; -1: no more.

    A slot is numbered over all workers: worker * slots_per_worker + slot of the worker.
    """

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.slots_ER)

    @cached_property
    def num_replicas_E(self) -> npt.NDArray[np.int64]:
        """Replicas of each expert."""
        counts_E: npt.NDArray[np.int64] = (self.slots_ER != EMPTY).sum(axis=1)
        return counts_E

    @cached_property
    def workers_ER(self) -> SlotExperts:
        """Worker of each replica; -1: no more."""
        return np.where(self.slots_ER == EMPTY, EMPTY, self.slots_ER // self.slots_per_worker)

    def per_worker(self, values_ER: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Sum integer values of the replicas over each worker: int64 [W]."""
        used_ER = self.slots_ER != EMPTY
        sums_W = np.zeros(self.num_workers, dtype=np.int64)
        np.add.at(sums_W, self.workers_ER[used_ER], values_ER[used_ER])
        return sums_W


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Placement:
    """Experts of all slots; every MoE layer has a table of its own. Raises ValueError on shapes."""

    num_workers: int
    slots_per_worker: int
    layers: Mapping[int, SlotExperts]
    """Layer index -> int32 [W, C], the logical expert of each slot, -1: empty. Made read-only."""

    def __post_init__(self) -> None:
        for layer, experts_WC in self.layers.items():
            if experts_WC.shape != (self.num_workers, self.slots_per_worker):
                raise ValueError(
                    f"the placement of layer {layer} is for {experts_WC.shape} workers and slots, "
                    f"not {(self.num_workers, self.slots_per_worker)}"
                )
            experts_WC.setflags(write=False)

    def worker_slots(self, layer: int, worker: int) -> SlotExperts:
        """int32 [C]: the experts in a worker's slots; -1: empty."""
        slots_C: SlotExperts = self.layers[layer][worker]
        return slots_C

    def replicas(self, layer: int, num_experts: int) -> LayerReplicas:
        """Where each expert of a layer can be computed."""
        places: list[list[int]] = [[] for _ in range(num_experts)]
        for slot, expert in enumerate(self.layers[layer].ravel().tolist()):
            if expert != EMPTY:
                places[expert].append(slot)
        slots_ER = np.full((num_experts, max(map(len, places))), EMPTY, dtype=np.int32)
        for expert, slots in enumerate(places):
            slots_ER[expert, : len(slots)] = slots
        return LayerReplicas(
            num_workers=self.num_workers,
            slots_per_worker=self.slots_per_worker,
            slots_ER=slots_ER,
        )

    def check(self, num_experts: int) -> None:
        """Raise ValueError unless each layer has all experts, and no worker has an expert twice."""
        for layer, experts_WC in self.layers.items():
            held_by_E = np.zeros(num_experts, dtype=np.int64)
            for worker, slots_C in enumerate(experts_WC):
                held, num_copies = np.unique(slots_C[slots_C != EMPTY], return_counts=True)
                unknown = held[(held < 0) | (held >= num_experts)]
                if unknown.size:
                    raise ValueError(
                        f"layer {layer}: expert worker {worker} holds expert {unknown[0]}, but the "
                        f"experts are 0 to {num_experts - 1}"
                    )
                if held[num_copies > 1].size:
                    raise ValueError(
                        f"layer {layer}: expert worker {worker} holds expert "
                        f"{held[num_copies > 1][0]} more than once"
                    )
                held_by_E[held] += 1
            if not held_by_E.all():
                raise ValueError(
                    f"layer {layer}: expert {np.flatnonzero(held_by_E == 0)[0]} has no slot on any "
                    "expert worker"
                )


def round_robin(
    *,
    moe_layers: Sequence[int],
    num_experts: int,
    num_workers: int,
    slots_per_worker: int | None = None,
) -> Placement:
    """Deal experts out in turn: expert e of the i-th MoE layer goes to worker (e + i) mod W.

    Further slots hold further replicas, dealt out in turn too; slots beyond one for every expert
    stay empty. `slots_per_worker`, C, is by default the least that holds all experts. Raises
    ValueError if there are more workers than experts, or too few slots.
    """
    assert num_workers > 0, "a placement needs an expert worker"
    if num_workers > num_experts:
        raise ValueError(
            f"there are more expert workers than experts: {num_workers} workers, {num_experts} "
            "experts a layer"
        )
    needed = -(-num_experts // num_workers)
    if slots_per_worker is None:
        slots_per_worker = needed
    if slots_per_worker < needed:
        raise ValueError(
            f"{num_experts} experts on {num_workers} expert workers need {needed} expert slots a "
            f"worker and layer, not {slots_per_worker}"
        )
    return Placement(
        num_workers=num_workers,
        slots_per_worker=slots_per_worker,
        layers={
            layer: _deal(turn, num_experts, num_workers, slots_per_worker)
            for turn, layer in enumerate(moe_layers)
        },
    )


def _deal(turn: int, num_experts: int, num_workers: int, num_slots: int) -> SlotExperts:
    """int32 [W, C] of the MoE layer whose turn it is."""
    experts_WC = np.full((num_workers, num_slots), EMPTY, dtype=np.int32)
    held_WE = np.zeros((num_workers, num_experts), dtype=bool)
    num_replicas_E = np.ones(num_experts, dtype=np.int64)
    for worker in range(num_workers):
        first = (worker - turn) % num_workers
        experts_WC[worker, : len(range(first, num_experts, num_workers))] = np.arange(
            first, num_experts, num_workers
        )
        held_WE[worker, first::num_workers] = True
    next_expert = turn % num_experts
    for slot in range(min(num_slots, num_experts)):
        for worker in np.flatnonzero(experts_WC[:, slot] == EMPTY).tolist():
            # Replicas and turn in one number: its minimum is the next in turn of the experts with
            # the fewest replicas.
            in_turn_E = (np.arange(num_experts) - next_expert) % num_experts
            rank_E = num_replicas_E * num_experts + in_turn_E
            expert = int(np.where(held_WE[worker], np.iinfo(np.int64).max, rank_E).argmin())
            experts_WC[worker, slot] = expert
            held_WE[worker, expert] = True
            num_replicas_E[expert] += 1
            next_expert = (expert + 1) % num_experts
    return experts_WC
