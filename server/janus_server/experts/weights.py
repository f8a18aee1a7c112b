"""The weights that one expert worker holds: every gate, and the experts of its slots."""

from dataclasses import dataclass

import numpy as np
import torch

from janus_kernels.linear import pack_weight
from janus_scheduler.placement import Placement
from janus_server.model.weights import WeightReader


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerWeights:
    """One MoE layer. E logical experts, C expert slots, H hidden, F expert intermediate."""

    gate_EH: torch.Tensor
    """Packed."""
    gate_up_CHF: tuple[torch.Tensor, ...]
    """Per slot, packed: gate rows, then up rows."""
    down_CFH: tuple[torch.Tensor, ...]
    """Per slot, packed."""
    first_slot_E: torch.Tensor
    """int64: the slot here that holds the first replica of an expert; -1: another worker does."""


def load_layers(reader: WeightReader, placement: Placement, worker: int) -> dict[int, LayerWeights]:
    """Read the gates and the experts that `placement` gives to `worker`, and nothing else."""
    names, spec = reader.checkpoint.family.names, reader.checkpoint.spec
    layers: dict[int, LayerWeights] = {}
    for layer in spec.moe_layers:
        gate_up: list[torch.Tensor] = []
        down: list[torch.Tensor] = []
        slots_C = placement.worker_slots(layer, worker)
        experts = slots_C[slots_C >= 0].tolist()
        for expert in experts:
            where = {"layer": layer, "expert": expert}
            gate_up.append(
                pack_weight(
                    reader.read_rows(
                        names.expert_gate.format(**where), names.expert_up.format(**where)
                    )
                )
            )
            down.append(pack_weight(reader.read(names.expert_down.format(**where))))
        layers[layer] = LayerWeights(
            gate_EH=pack_weight(reader.read(names.gate.format(layer=layer))),
            gate_up_CHF=tuple(gate_up),
            down_CFH=tuple(down),
            first_slot_E=_first_slots(placement, layer, worker, spec.num_experts).to(reader.device),
        )
    return layers


def _first_slots(placement: Placement, layer: int, worker: int, num_experts: int) -> torch.Tensor:
    first_slot_E = np.full(num_experts, -1, dtype=np.int64)
    held = placement.worker_slots(layer, worker)
    held = held[held >= 0].tolist()
    for expert, replicas in enumerate(placement.replicas(layer, num_experts)):
        if replicas[0][0] == worker:
            first_slot_E[expert] = held.index(expert)
    return torch.from_numpy(first_slot_E)
