"""`janus placement`: what it prints, writes and draws, and what it refuses."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from janus_bench.placement import command
from janus_bench.routing_traces import RECORDED
from janus_scheduler.placement_policies import PLACEMENT_POLICIES
from janus_server.controller.placement import read_placement
from janus_server.errors import ConfigError

DEMO = str(RECORDED / "demo.npz")


def flags(*extra: str, trace: str = DEMO, workers: int = 4, slots: int = 9) -> list[str]:
    required = ["--trace", trace, "--workers", str(workers), "--slots", str(slots)]
    return [*required, "--samples", "20", "--effort", "20", *extra]


def test_prints_writes_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for suffix in ("png", "svg"):
        figure, output = tmp_path / f"p.{suffix}", tmp_path / "p.json"
        assert command(flags("--output", str(output), "--plot", str(figure))) == 0
        assert figure.stat().st_size > 10_000
    placement = read_placement(output, 32)
    assert (placement.num_workers, placement.slots_per_worker) == (4, 9)
    # layer, a_max, p99, floor, imbalance, replicated, most replicas
    rows = [re.split(r"[│\s]+", line)[1:-1] for line in capsys.readouterr().out.splitlines()]
    layers = [row for row in rows[: len(rows) // 2] if row and row[0].isdigit()]
    [means] = [row for row in rows[: len(rows) // 2] if row and row[0] == "all"]
    assert [row[0] for row in layers] == ["0", "1", "2", "3"]
    for layer, (_, a_max, p99, floor, _, replicated, most) in enumerate(layers):
        assert float(floor) <= float(a_max) < float(p99)
        num_replicas_E = placement.replicas(layer, 32).num_replicas_E
        assert (int(replicated), int(most)) == ((num_replicas_E > 1).sum(), num_replicas_E.max())
    for column in range(1, 5):
        mean = np.mean([float(row[column]) for row in layers])
        assert float(means[column]) == pytest.approx(mean, abs=0.011)
    assert sorted(placement.layers) == [0, 1, 2, 3]
    assert json.loads(output.read_text())["num_experts"] == 32


def test_compares_policies(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(flags("--policy", "all")) == 0
    printed = capsys.readouterr().out
    a_max = {
        policy: float(re.search(rf"{policy} *│ *([\d.]+)", printed)[1])
        for policy in PLACEMENT_POLICIES
    }
    assert a_max["search"] == min(a_max.values()) < a_max["round_robin"]


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (["--slots", "7"], "32 experts on 4 expert workers need 8 expert slots"),
        (["--slots", "33"], "a worker has 33 expert slots a layer for 32 experts"),
        (["--workers", "0"], "--workers must be at least 1"),
        (["--workers", "40"], "more expert workers than experts"),
        (["--plot", "figure.gif"], "ends in .png or .svg"),
        (["--policy", "all", "--output", "x.json"], "need one --policy"),
        (["--output", "/"], "--output: cannot write /: Is a directory"),
        (["--output", "/nowhere/x.json"], "--output: cannot write /nowhere/x.json: No such file"),
        (["--output", "x.svg", "--plot", "./x.svg"], "must name different files"),
        (["--output", DEMO], "must name different files"),
        (
            ["--samples", "16385", "--batch", "1024"],
            "must be at most 16777216 tokens, not 16778240",
        ),
        (["--trace", "/nowhere.npz"], "cannot read /nowhere.npz: No such file"),
    ],
)
def test_refuses_with_a_sentence(extra: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        command(flags(*extra))
