"""The weights that an expert worker holds: every gate, and the experts of its slots."""

from dataclasses import dataclass

import torch

from janus_kernels.linear import pack_weight
from janus_kernels.replica_table import ReplicaTable, replica_table
from janus_scheduler.placement import EMPTY, Placement
from janus_server.model.weights import WeightReader


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLayerWeights:
    """One MoE layer. E logical experts, C expert slots, H hidden, F expert intermediate."""

    gate_EH: torch.Tensor
    """Packed."""
    gate_up_CHF: tuple[torch.Tensor, ...]
    """Per slot, packed: gate rows, then up rows; an empty slot has an empty tensor."""
    down_CFH: tuple[torch.Tensor, ...]
    """Per slot, packed; an empty slot has an empty tensor."""
    replicas: ReplicaTable
    """Where each expert can be computed, on any worker."""


def load_layers(
    reader: WeightReader, placement: Placement, worker: int
) -> dict[int, ExpertLayerWeights]:
    """Read the gates and the experts that `placement` gives to `worker`, and nothing else."""
    names, spec = reader.checkpoint.family.names, reader.checkpoint.spec
    layers: dict[int, ExpertLayerWeights] = {}
    for layer in spec.moe_layers:
        gate_up: list[torch.Tensor] = []
        down: list[torch.Tensor] = []
        for expert in placement.worker_slots(layer, worker).tolist():
            if expert == EMPTY:
                gate_up.append(torch.empty(0))
                down.append(torch.empty(0))
                continue
            where = {"layer": layer, "expert": expert}
            gate_up.append(
                pack_weight(
                    reader.read_rows(
                        names.expert_gate.format(**where), names.expert_up.format(**where)
                    )
                )
            )
            down.append(pack_weight(reader.read(names.expert_down.format(**where))))
        layers[layer] = ExpertLayerWeights(
            gate_EH=pack_weight(reader.read(names.gate.format(layer=layer))),
            gate_up_CHF=tuple(gate_up),
            down_CFH=tuple(down),
            replicas=replica_table(
                torch.from_numpy(placement.replicas(layer, spec.num_experts).slots_ER).to(
                    reader.device
                ),
                num_workers=placement.num_workers,
                slots_per_worker=placement.slots_per_worker,
            ),
        )
    return layers
