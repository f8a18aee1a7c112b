"""Costs are found from probes on a fake device whose clock follows known costs."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from janus_scheduler.activation import ActivationCosts
from janus_server.experts.calibration import measure_costs
from tests.fakes.model_specs import SMALL_SPEC


class FakeDevice:
    """Computes nothing, and takes as long as it is told to."""

    def __init__(self, *, expert_s: float, pair_s: float, disturbed: Sequence[int] = ()) -> None:
        self.now_s = 100.0
        self.weights_used: list[int] = []
        self._expert_s, self._pair_s = expert_s, pair_s
        self._disturbed = disturbed

    def clock(self) -> float:
        return self.now_s

    def ffn(
        self,
        x_TH: torch.Tensor,
        slots_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        tokens_C: torch.Tensor,
        gate_up_CHF: Sequence[torch.Tensor],
        down_CFH: Sequence[torch.Tensor],
        *,
        first_slot: int,
    ) -> torch.Tensor:
        """Advance the clock by what the probe costs here."""
        assert int(tokens_C.sum()) == slots_TK.numel() == len(x_TH)
        assert len(gate_up_CHF) == len(down_CFH) == len(tokens_C)
        self.now_s += 20e-6 + self._expert_s * int((tokens_C > 0).sum())
        self.now_s += self._pair_s * slots_TK.numel()
        if len(self.weights_used) in self._disturbed:
            self.now_s += 1.0
        self.weights_used.append(id(gate_up_CHF[0]))
        return x_TH


def measure(device: FakeDevice, **options: Any) -> ActivationCosts:
    return measure_costs(
        SMALL_SPEC,
        dtype=torch.float32,
        device=torch.device("cpu"),
        ffn=device.ffn,
        clock=device.clock,
        **options,
    )


@pytest.mark.parametrize(("expert_s", "pair_s"), [(30e-6, 2e-6), (1e-6, 50e-6), (4e-6, 0.5e-6)])
def test_costs_are_those_of_the_device(expert_s: float, pair_s: float) -> None:
    costs = measure(FakeDevice(expert_s=expert_s, pair_s=pair_s))
    assert costs.expert_ps == pytest.approx(1e12 * expert_s, abs=100)
    assert costs.pair_ps == pytest.approx(1e12 * pair_s, abs=100)


def test_disturbed_probes_do_not_count() -> None:
    # Of the second probe: the first call, which may compile, and three of the seven that are timed.
    disturbed = [8 + call for call in (0, 2, 3, 7)]
    costs = measure(FakeDevice(expert_s=30e-6, pair_s=2e-6, disturbed=disturbed))
    assert costs.expert_ps == pytest.approx(30e6, abs=100)
    assert costs.pair_ps == pytest.approx(2e6, abs=100)


def test_each_probe_reads_other_weights_than_the_one_before() -> None:
    device = FakeDevice(expert_s=1e-6, pair_s=1e-6)
    measure(device)
    first_probe = device.weights_used[:8]
    assert len(set(first_probe)) == 8


def test_a_device_too_fast_for_the_clock_still_gives_usable_costs() -> None:
    costs = measure(FakeDevice(expert_s=0.0, pair_s=0.0))
    assert (costs.expert_ps, costs.pair_ps) == (1, 1)


def test_the_real_experts_can_be_measured() -> None:
    costs = measure_costs(SMALL_SPEC, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert max(costs.expert_ps, costs.pair_ps) > 1
