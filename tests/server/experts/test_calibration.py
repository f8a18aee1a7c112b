import torch

from janus_server.experts.calibration import measure_costs
from tests.fakes.model_specs import SMALL_SPEC


def test_costs_are_measured_and_usable() -> None:
    # What they come to is the machine's business.
    costs = measure_costs(SMALL_SPEC, dtype=torch.float32, device=torch.device("cpu"))
    assert costs.expert_ps >= 1
    assert costs.pair_ps >= 1
