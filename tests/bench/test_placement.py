"""`janus placement`: what it prints, writes and draws, and what it refuses."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from janus_bench.placement import command
from janus_bench.routing_traces import RECORDED, SyntheticRouting, read_routing
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
        (["--trace", "/nowhere.npz"], "cannot read the routing trace"),
    ],
)
def test_refuses_with_a_sentence(extra: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        command(flags(*extra))


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"topk_ids": np.zeros((1, 2, 2), int)}, "needs the arrays"),
        ({"topk_ids": np.array([[[0, 4]]])}, "must be experts 0 to 3"),
        ({"topk_ids": np.array([[[1, 1]]])}, "names an expert twice"),
        ({"topk_ids": np.zeros((1, 0, 2), int)}, "holds no tokens"),
        ({"topk_ids": np.zeros((3, 2), int)}, "must be integers"),
    ],
)
def test_broken_traces(arrays: dict[str, np.ndarray], sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    if "needs" not in sentence:
        arrays = {"layers": np.array([0]), "num_experts": np.array(4), **arrays}
    np.savez(path, **arrays)
    with pytest.raises(ConfigError, match=sentence):
        read_routing(path)
    path.write_text("no archive")
    with pytest.raises(ConfigError, match="routing trace"):
        read_routing(path)


def test_synthetic_routing_has_the_stated_skew_and_blocks() -> None:
    counts = {
        zipf: np.bincount(
            SyntheticRouting(num_experts=32, top_k=2, zipf=zipf, block_boost=1)
            .sample(4000)
            .layers[0]
            .ravel(),
            minlength=32,
        )
        for zipf in (0.0, 1.0)
    }
    assert counts[0.0].max() < 1.3 * counts[0.0].mean()
    assert counts[1.0].max() > 4 * counts[1.0].mean()
    together = [
        SyntheticRouting(num_experts=32, top_k=4, zipf=0.0, block_boost=boost).sample(2000)
        for boost in (1.0, 50.0)
    ]
    distinct_sets = [len(np.unique(np.sort(t.layers[0], axis=1), axis=0)) for t in together]
    assert distinct_sets[1] < distinct_sets[0] / 2
