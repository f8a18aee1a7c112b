"""`janus placement`: place experts by a recorded routing trace, and judge the placement."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from janus_bench.report import check_output
from janus_bench.routing_traces import RoutingSample, read_routing
from janus_scheduler.placement import Placement
from janus_scheduler.placement_policies import PLACEMENT_POLICIES, PlacementPolicy, place
from janus_scheduler.routing import ExpectedLoad, expected_load, expert_counts, sample_batches
from janus_server.bounds import Between
from janus_server.command_line import parse
from janus_server.controller.placement import write_placement
from janus_server.errors import ConfigError

_JUDGING_SEED = 1
"""Added to the seed of the search: a placement is judged on batches that it was not fitted to."""
_MOST_TOKENS = 2**24
"""Drawn to judge a layer, which takes some seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacementConfig:
    """Place a model's experts by a routing trace, with replicas in the slots to spare.

    Prints for each layer, and over all, the expected a_max (the most distinct experts that one
    worker reads for a batch, under the exact schedule), its floor (an even spread), the imbalance
    of tokens and the replicas.
    """

    trace: str
    """Routing trace (.npz), as `python -m janus_bench.record_routing` writes it."""

    workers: Annotated[int, Between(1, 1024)]
    """Expert workers."""

    slots: Annotated[int, Between(1, 2**16)]
    """Expert slots of each worker and layer."""

    policy: Literal[PlacementPolicy, "all"] = "search"
    """How to place; all: compare them."""

    batch: Annotated[int, Between(1, 2**16)] = 64
    """Tokens of a decode batch, over all requests: search and the expected a_max are for it."""

    samples: Annotated[int, Between(1, 2**16)] = 200
    """Batches drawn to judge a layer."""

    nodes: Annotated[int, Between(1, 1024)] = 1
    """Nodes that the workers are on; eplb gives each node whole groups of experts."""

    groups: Annotated[int, Between(1, 2**16)] = 1
    """Expert groups of the model, which eplb deals out to nodes."""

    effort: Annotated[int, Between(0, 2**31)] = 1000
    """Changes that search tries for each layer."""

    seed: Annotated[int, Between(0, 2**62)] = 0
    """Seed of search."""

    output: str = ""
    """JSON file to write the placement to, for `janus serve --placement`."""

    plot: str = ""
    """PNG or SVG file for a drawing of what each worker reads and of the experts' loads."""


def command(argv: Sequence[str]) -> int:
    """Place experts by a recorded routing trace and print the expected load."""
    config = parse(PlacementConfig, argv, prog="janus placement")
    _check(config)
    trace = read_routing(Path(config.trace))
    console = Console()
    if config.policy == "all":
        _print_comparison(console, config, trace)
        return 0
    with console.status("placing"):
        placement = place_by(config, trace, config.policy)
        loads = judge(config, trace, placement)
    _print_layers(console, config, trace, placement, loads)
    if config.output:
        write_placement(Path(config.output), placement, trace.num_experts)
        console.print(f"written to {config.output}", highlight=False)
    if config.plot:
        from janus_bench.figures import draw_placement  # slow to import

        draw_placement(
            Path(config.plot),
            trace,
            placement,
            batch_tokens=config.batch,
            num_batches=config.samples,
        )
        console.print(f"drawn to {config.plot}", highlight=False)
    return 0


def _check(config: PlacementConfig) -> None:
    if config.policy == "all" and (config.output or config.plot):
        raise ConfigError("--output and --plot need one --policy, not all")
    if config.plot and Path(config.plot).suffix.lower() not in (".png", ".svg"):
        raise ConfigError(f"--plot needs a name that ends in .png or .svg, not {config.plot}")
    named = [os.path.realpath(path) for path in (config.trace, config.output, config.plot) if path]
    if len(set(named)) < len(named):
        raise ConfigError("--trace, --output and --plot must name different files")
    for name in ("output", "plot"):
        check_output(name, getattr(config, name))
    drawn = config.batch * config.samples
    if drawn > _MOST_TOKENS:
        raise ConfigError(
            f"--batch times --samples must be at most {_MOST_TOKENS} tokens, not {drawn}"
        )


def place_by(config: PlacementConfig, trace: RoutingSample, policy: PlacementPolicy) -> Placement:
    """Place the trace's layers; raises ConfigError where they do not fit."""
    try:
        return place(
            trace.layers,
            policy,
            num_experts=trace.num_experts,
            num_workers=config.workers,
            slots_per_worker=config.slots,
            num_nodes=config.nodes,
            num_groups=config.groups,
            batch_tokens=config.batch,
            effort=config.effort,
            seed=config.seed,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def judge(
    config: PlacementConfig, trace: RoutingSample, placement: Placement
) -> dict[int, ExpectedLoad]:
    """The expected load of each layer, on other batches than those of the search."""
    loads: dict[int, ExpectedLoad] = {}
    for layer, ids_NK in trace.layers.items():
        active_BE = sample_batches(
            ids_NK,
            trace.num_experts,
            num_tokens=config.batch,
            num_batches=config.samples,
            seed=config.seed + _JUDGING_SEED,
        )
        counts_E = expert_counts(ids_NK, trace.num_experts)
        replicas = placement.replicas(layer, trace.num_experts)
        loads[layer] = expected_load(active_BE, counts_E, replicas)
    return loads


def _print_layers(
    console: Console,
    config: PlacementConfig,
    trace: RoutingSample,
    placement: Placement,
    loads: dict[int, ExpectedLoad],
) -> None:
    table = Table(
        title=f"{config.policy}: {trace.num_experts} experts on {config.workers} workers of "
        f"{config.slots} slots, batches of {config.batch} tokens"
    )
    for name in ("layer", "a_max", "p99", "floor", "imbalance", "replicated", "most replicas"):
        table.add_column(name, justify="right")
    for layer, load in loads.items():
        num_replicas_E = placement.replicas(layer, trace.num_experts).num_replicas_E
        replicated, most = int((num_replicas_E > 1).sum()), int(num_replicas_E.max())
        table.add_row(str(layer), *_cells([load]), str(replicated), str(most))
    table.add_section()
    table.add_row("all", *_cells(list(loads.values())), "", "")
    console.print(table)


def _print_comparison(console: Console, config: PlacementConfig, trace: RoutingSample) -> None:
    table = Table(title="mean over the layers")
    for name in ("policy", "a_max", "p99", "floor", "imbalance"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for policy in PLACEMENT_POLICIES:
        with console.status(f"placing by {policy}"):
            loads = judge(config, trace, place_by(config, trace, policy))
        table.add_row(policy, *_cells(list(loads.values())))
    console.print(table)


def _cells(loads: Sequence[ExpectedLoad]) -> list[str]:
    """Means of a_max, p99, floor and imbalance."""
    columns = [(load.a_max, load.a_max_p99, load.floor, load.imbalance) for load in loads]
    return [f"{mean:.2f}" for mean in np.mean(columns, axis=0)]
