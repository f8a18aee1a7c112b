from typing import Any

import pytest
import torch

from janus_scheduler.placement import round_robin
from janus_server.experts.memory import expert_needs
from janus_server.experts.weights import load_layers
from janus_server.model.checkpoint import Checkpoint
from janus_server.model.config import ModelConfig
from janus_server.model.weights import WeightReader, dtype_of
from tests.conftest import CheckpointFactory


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("num_workers", "num_slots"), [(1, None), (2, 4), (4, None), (2, 6)])
def test_weights_are_those_that_are_loaded(
    make_checkpoint: CheckpointFactory, num_workers: int, num_slots: int | None, dtype: Any
) -> None:
    checkpoint = Checkpoint.open(make_checkpoint())
    spec = checkpoint.spec
    model = ModelConfig(checkpoint=str(checkpoint.path), dtype=dtype)
    placement = round_robin(
        moe_layers=spec.moe_layers,
        num_experts=spec.num_experts,
        num_workers=num_workers,
        slots_per_worker=num_slots,
    )
    for worker in range(num_workers):
        with WeightReader(checkpoint, dtype=dtype_of(model), device=torch.device("cpu")) as reader:
            layers = load_layers(reader, placement, worker)
        loaded = sum(
            tensor.nbytes
            for layer in layers.values()
            for tensor in (layer.gate_EH, *layer.gate_up_CHF, *layer.down_CFH)
        )
        assert expert_needs(spec, placement, worker, model, num_tokens=1).weights == loaded
        steps = expert_needs(spec, placement, worker, model, num_tokens=10_000)
        assert steps.total > expert_needs(spec, placement, worker, model, num_tokens=5000).total
