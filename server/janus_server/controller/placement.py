"""The placement that a server starts with: from a file that `janus placement` wrote, or dealt out.

The file is JSON: {"num_experts": E, "layers": {"3": [[experts of worker 0's slots], ...], ...}}, -1
for an empty slot.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from janus_scheduler.model_spec import ModelSpec
from janus_scheduler.placement import Placement, round_robin
from janus_server.controller.config import PoolConfig
from janus_server.errors import ConfigError
from janus_server.input_file import read_json


def first_placement(pools: PoolConfig, spec: ModelSpec) -> Placement:
    """Where the experts go at the start; raises ConfigError where file, pools and model differ."""
    if pools.expert_workers < 1:
        raise ConfigError("--expert-workers must be at least 1 to place experts, not 0")
    if not pools.placement:
        return round_robin(
            moe_layers=spec.moe_layers,
            num_experts=spec.num_experts,
            num_workers=pools.expert_workers,
            slots_per_worker=pools.expert_slots or None,
        )
    placement = read_placement(Path(pools.placement), spec.num_experts)
    if placement.num_workers != pools.expert_workers:
        raise ConfigError(
            f"{pools.placement} places experts on {placement.num_workers} workers, but "
            f"--expert-workers is {pools.expert_workers}"
        )
    if pools.expert_slots not in (0, placement.slots_per_worker):
        raise ConfigError(
            f"{pools.placement} gives each worker {placement.slots_per_worker} expert slots, but "
            f"--expert-slots is {pools.expert_slots}"
        )
    foreign, missing = (
        set(placement.layers) - set(spec.moe_layers),
        set(spec.moe_layers) - set(placement.layers),
    )
    if foreign:
        raise ConfigError(f"{pools.placement} places experts in layer {min(foreign)}, without any")
    if missing:
        raise ConfigError(f"{pools.placement} does not place the experts of layer {min(missing)}")
    return placement


def read_placement(path: Path, num_experts: int) -> Placement:
    """Read and check a placement of `num_experts` experts a layer; raises ConfigError."""
    content = read_json(path, ConfigError)
    try:
        placement = _placement(content, num_experts)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise ConfigError(
            f'{path} is not a placement of this model: "layers" must give each layer a table of '
            f"integers, one row of equal length a worker ({error})"
        ) from None
    try:
        placement.check(num_experts)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    return placement


def write_placement(path: Path, placement: Placement, num_experts: int) -> None:
    """Write what `read_placement` reads."""
    layers = {str(layer): table.tolist() for layer, table in placement.layers.items()}
    path.write_text(json.dumps({"num_experts": num_experts, "layers": layers}) + "\n")


def _placement(content: Any, num_experts: int) -> Placement:
    if content["num_experts"] != num_experts:
        raise ValueError(f"it is for {content['num_experts']} experts, not {num_experts}")
    tables = {int(layer): _table(rows) for layer, rows in content["layers"].items()}
    first = next(iter(tables.values()), None)
    if first is None:
        raise ValueError("it has no layer")
    if len(tables) < len(content["layers"]):
        raise ValueError("it has a layer twice")
    return Placement(num_workers=first.shape[0], slots_per_worker=first.shape[1], layers=tables)


def _table(rows: Any) -> np.ndarray[Any, np.dtype[np.int32]]:
    table = np.array(rows)
    if table.ndim != 2 or not table.size or table.dtype.kind != "i":
        raise ValueError("a table must have two dimensions, of integers")
    bounds = np.iinfo(np.int32)
    if table.min() < bounds.min or table.max() > bounds.max:
        raise ValueError("an expert is out of any range")
    return table.astype(np.int32)
