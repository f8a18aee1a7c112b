"""Placements from a file: read what was written, and refuse the rest by name."""

import json
from pathlib import Path

import pytest

from janus_scheduler.placement import round_robin
from janus_server.controller.config import PoolConfig
from janus_server.controller.placement import first_placement, read_placement, write_placement
from janus_server.errors import ConfigError
from tests.fakes.model_specs import SMALL_SPEC


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "placement.json"
    placement = round_robin(moe_layers=(0, 2), num_experts=5, num_workers=2, slots_per_worker=4)
    write_placement(path, placement, 5)
    pools = PoolConfig(expert_workers=2, placement=str(path))
    read = first_placement(pools, SMALL_SPEC)
    assert {k: v.tolist() for k, v in read.layers.items()} == {
        k: v.tolist() for k, v in placement.layers.items()
    }


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        ({"0": [[0, 1, 2], [3, 4, 0]]}, "does not place the experts of layer 2"),
        ({"0": [[0, 1, 2], [3, 4, 4]]}, "layer 0: expert worker 1 holds expert 4 more than once"),
        ({"0": [[0, 1, 2], [3, 3, 1]]}, "worker 1 holds expert 3 more than once"),
        ({"0": [[0, 1, 2], [3, 1, -1]]}, "layer 0: expert 4 has no slot on any"),
        ({"0": [[0, 1, 2], [3, 4, 9]]}, "worker 1 holds expert 9, but the experts are 0 to 4"),
        ({"0": [[0, 1, 2, 3, 4]]}, "places experts on 1 workers, but --expert-workers is 2"),
        ({"0": [[0, 1, 2], [3, 4]]}, "is not a placement"),
        ({"0": [[2**32]]}, "out of any range"),
        ({"0": [[-(2**63)]]}, "out of any range"),
        ({"0": [[0]], "00": [[0]]}, "a layer twice"),
        (
            {"0": [[0, 1, 2], [3, 4, 0]], "1": [[0, 1, 2], [3, 4, 0]]},
            "experts in layer 1, without any",
        ),
        ({"0": [[0.5]]}, "is not a placement"),
        ({"zero": [[0]]}, "is not a placement"),
        ({}, "is not a placement"),
        ([], "is not a placement"),
    ],
)
def test_refused_by_name(layers: object, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "placement.json"
    path.write_text(json.dumps({"num_experts": 5, "layers": layers}))
    with pytest.raises(ConfigError, match=sentence):
        first_placement(PoolConfig(expert_workers=2, placement=str(path)), SMALL_SPEC)


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "placement.json"
    with pytest.raises(ConfigError, match=r"cannot read .*placement\.json: No such file"):
        read_placement(path, 5)
    path.write_text("{")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        read_placement(path, 5)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="is not a placement"):
        read_placement(path, 5)


def test_slots_that_contradict_the_file(tmp_path: Path) -> None:
    path = tmp_path / "placement.json"
    placement = round_robin(moe_layers=(0, 2), num_experts=5, num_workers=2)
    write_placement(path, placement, 5)
    pools = PoolConfig(expert_workers=2, expert_slots=5, placement=str(path))
    with pytest.raises(ConfigError, match="gives each worker 3 expert slots, but"):
        first_placement(pools, SMALL_SPEC)
