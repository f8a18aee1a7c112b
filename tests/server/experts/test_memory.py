import subprocess
import sys
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


LOADING = """
import re, sys, torch
from pathlib import Path
from janus_scheduler.placement import round_robin
from janus_server.experts.weights import load_layers
from janus_server.model.checkpoint import Checkpoint
from janus_server.model.cpu import use_cpu
from janus_server.model.weights import WeightReader

def resident():
    return 1024 * int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

use_cpu(1)
checkpoint = Checkpoint.open(sys.argv[1])
spec = checkpoint.spec
placement = round_robin(moe_layers=spec.moe_layers, num_experts=spec.num_experts, num_workers=1)
reader = WeightReader(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
before = resident()
with reader:
    layers = load_layers(reader, placement, 0)
print(resident() - before)
"""


def test_loading_leaves_no_gaps_between_the_weights(make_checkpoint: CheckpointFactory) -> None:
    wide = {"hidden_size": 256, "moe_intermediate_size": 512, "num_experts": 24}
    checkpoint = Checkpoint.open(make_checkpoint(**wide))
    model = ModelConfig(checkpoint=str(checkpoint.path), dtype="fp32")
    spec = checkpoint.spec
    placement = round_robin(moe_layers=spec.moe_layers, num_experts=spec.num_experts, num_workers=1)
    needs = expert_needs(spec, placement, 0, model, num_tokens=1)
    # In a process of its own, as this one has gaps already.
    result = subprocess.run(
        [sys.executable, "-c", LOADING, str(checkpoint.path)],
        capture_output=True,
        check=True,
        text=True,
    )
    assert int(result.stdout) < 1.2 * needs.weights
