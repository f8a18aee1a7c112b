"""`janus bench schedule`: every policy on the same batches, against the optimum and no replication.

For each model shape, number of expert workers and share of spare slots, experts are placed once, as
`janus placement` does, on one half of the routing; batches are drawn from the other half. `none` is
no replication on the same workers with as many slots, searched as long. The optimum is found by
maximum flow (SciPy), which shares no code with the schedules.

Shapes: T tokens, K experts of a token, E logical experts, W expert workers.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from janus_bench.figures import draw_schedules
from janus_bench.optimum import least_a_max
from janus_bench.report import RESULTS, check_output, environment, write_result
from janus_bench.routing_traces import RECORDED, RoutingSample, SyntheticRouting, read_routing
from janus_kernels.activation_schedule import ActivationSchedule, activation_schedule
from janus_kernels.replica_table import Policy, ReplicaTable, replica_table
from janus_scheduler.activation import POLICIES, SchedulePolicy
from janus_scheduler.placement import LayerReplicas
from janus_scheduler.placement_policies import (
    PlacementPolicy,
    place,
    place_without_replicas,
)
from janus_server.bounds import Between
from janus_server.command_line import parse
from janus_server.controller.config import ScheduleConfig
from janus_server.controller.scheduling import given_costs
from janus_server.errors import ConfigError

_TRACE_TOKENS = 8192
_MOST_PAIRS = 400_000
"""Token-expert pairs scheduled for a row, at most: fewer samples of large batches are drawn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The sizes of a model that matter here, and the source of its routing."""

    hidden: int
    inner: int
    """Expert intermediate size."""
    routing: SyntheticRouting | str
    """Made up, or the name of a recorded trace."""

    @property
    def expert_bytes(self) -> int:
        """Weights of one expert in bf16."""
        return 3 * self.hidden * self.inner * 2

    def trace(self, seed: int) -> RoutingSample:
        """One layer of routing."""
        if isinstance(self.routing, SyntheticRouting):
            return self.routing.sample(_TRACE_TOKENS, seed=seed)
        whole = read_routing(RECORDED / f"{self.routing}.npz")
        middle = sorted(whole.layers)[len(whole.layers) // 2]
        return dataclasses.replace(whole, layers={middle: whole.layers[middle]})


SHAPES = {
    "deepseek-v2": ModelShape(
        hidden=5120,
        inner=1536,
        routing=SyntheticRouting(num_experts=160, top_k=6, zipf=0.5),
    ),
    "qwen3-235b": ModelShape(
        hidden=4096,
        inner=1536,
        routing=SyntheticRouting(num_experts=128, top_k=8, zipf=0.5),
    ),
    "deepseek-v3": ModelShape(
        hidden=7168,
        inner=2048,
        routing=SyntheticRouting(num_experts=256, top_k=8, zipf=0.5),
    ),
    "demo": ModelShape(hidden=256, inner=48, routing="demo"),
    "moe64": ModelShape(hidden=256, inner=48, routing="moe64"),
}
"""Sizes from the models' config.json; the first three with made-up routing of a stated skew."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleBenchConfig:
    """Compare the policies of the activation schedule, and their time, on the same batches."""

    shapes: tuple[str, ...] = tuple(SHAPES)
    """Models: deepseek-v2, qwen3-235b and deepseek-v3 with made-up routing; demo and moe64 with
    recorded routing."""

    batches: Annotated[tuple[int, ...], Between(1, 2**20)] = (1, 4, 16, 64, 256, 1024, 4096)
    """Tokens of a batch."""

    workers: Annotated[tuple[int, ...], Between(1, 1024)] = (4, 6, 8, 16, 32)
    """Expert workers."""

    slots: Annotated[tuple[float, ...], Between(1, 1024)] = (1.0, 1.125, 1.25, 1.5)
    """Expert slots of all workers for each expert; rounded up to whole slots a worker."""

    placement: PlacementPolicy = "search"
    """How experts are placed."""

    samples: Annotated[int, Between(1, 2**20)] = 100
    """Batches drawn for each row; fewer if they are large."""

    proven: Annotated[int, Between(0, 2**20)] = 2
    """Of these batches, how many are compared with the optimum by maximum flow as well."""

    device: str = "cpu"
    """cpu or cuda: what is timed; a_max is the same."""

    expert_us: Annotated[float, Between(0, 1e6)] = 10.0
    """What auto assumes to read one more expert takes, in microseconds: about that of a DeepSeek-V2
    expert on an H200."""

    pair_us: Annotated[float, Between(0, 1e6)] = 0.1
    """What auto assumes to compute one more token-expert pair takes, in microseconds."""

    seed: Annotated[int, Between(0, 2**62)] = 0
    """Seed of all that is drawn at random."""

    output: str = ""
    """JSON file for the result, with the figure beside it; empty: schedule-DEVICE.json beside the
    committed results."""


def command(argv: Sequence[str]) -> int:
    """Compare activation schedules with the optimum and with no replication; time them."""
    config = parse(ScheduleBenchConfig, argv, prog="janus bench schedule")
    _check(config)
    torch.set_num_threads(1)
    measured_in = environment()
    console = Console()
    layouts = [
        (shape, workers, slots)
        for shape in config.shapes
        for workers in config.workers
        for slots in config.slots
    ]
    rows = [
        row
        for layout in track(layouts, "scheduling", console=console, transient=True)
        for row in _measure(config, *layout)
    ]
    if not rows:
        raise ConfigError("no shape has as many experts as there are workers")
    workers = 8 if 8 in config.workers else config.workers[0]
    for shape in config.shapes:
        console.print(_table(shape, [row for row in rows if row["shape"] == shape], workers))
    output = _output(config)
    configuration = dataclasses.asdict(config) | {
        "models": {name: dataclasses.asdict(SHAPES[name]) for name in config.shapes}
    }
    write_result(
        output,
        {
            "environment": measured_in,
            "configuration": configuration,
            "columns": list(rows[0]),
            # Column names once, not in each of thousands of rows.
            "results": [list(row.values()) for row in rows],
        },
    )
    _draw(config, rows, workers, output.with_suffix(".svg"))
    console.print(f"written to {output} and {output.with_suffix('.svg')}", highlight=False)
    return 0


def _check(config: ScheduleBenchConfig) -> None:
    unknown = set(config.shapes) - set(SHAPES)
    if unknown:
        raise ConfigError(f"there is no shape {min(unknown)!r}; there are: {', '.join(SHAPES)}")
    if not (config.shapes and config.batches and config.workers and config.slots):
        raise ConfigError("--shapes, --batches, --workers and --slots each need a value")
    given_costs(ScheduleConfig(expert_us=config.expert_us, pair_us=config.pair_us))
    if config.device not in ("cpu", "cuda"):
        raise ConfigError(f"--device must be cpu or cuda, not {config.device}")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU")
    output = _output(config)
    if output.suffix == ".svg":
        raise ConfigError(f"--output is the JSON file, not the figure: {output}")
    check_output("output", str(output))
    check_output("output", str(output.with_suffix(".svg")))


def _output(config: ScheduleBenchConfig) -> Path:
    return Path(config.output or RESULTS / f"schedule-{config.device}.json")


def _measure(
    config: ScheduleBenchConfig, shape: str, workers: int, slots: float
) -> Iterator[dict[str, Any]]:
    """A row for each batch size and policy; none if there are more workers than experts."""
    trace = SHAPES[shape].trace(config.seed)
    [ids_NK] = trace.layers.values()
    placed_by, drawn_from = np.array_split(ids_NK, 2)
    if workers > trace.num_experts:
        return
    ours, none = _place(config, placed_by, trace.num_experts, workers, slots)
    rng = np.random.default_rng(config.seed)
    for batch in config.batches:
        num_samples = min(config.samples, max(3, _MOST_PAIRS // (batch * ids_NK.shape[1])))
        replace = batch > len(drawn_from)
        drawn = [
            torch.from_numpy(drawn_from[rng.choice(len(drawn_from), batch, replace=replace)])
            for _ in range(num_samples)
        ]
        for row in _compare(config, drawn, ours, none):
            expert_mib = SHAPES[shape].expert_bytes / 2**20
            yield {
                "shape": shape,
                "workers": workers,
                "slots": slots,
                "slots_per_worker": ours.slots_per_worker,
                "batch": batch,
                **row,
                "slowest_worker_mib": round(row["a_max"] * expert_mib, 2),
                "all_workers_mib": round(row["experts_read"] * expert_mib, 2),
            }


def _place(
    config: ScheduleBenchConfig,
    ids_NK: np.ndarray[Any, np.dtype[np.int64]],
    num_experts: int,
    workers: int,
    slots: float,
) -> tuple[LayerReplicas, LayerReplicas]:
    """The placement with replicas, and a placement without them that has as many slots."""
    sizes: dict[str, int] = {
        "num_experts": num_experts,
        "num_workers": workers,
        "slots_per_worker": min(num_experts, math.ceil(slots * num_experts / workers)),
        "seed": config.seed,
    }
    ours = place({0: ids_NK}, config.placement, **sizes)
    none = dataclasses.replace(ours, layers={0: place_without_replicas(ids_NK, **sizes)})
    return ours.replicas(0, num_experts), none.replicas(0, num_experts)


def _compare(
    config: ScheduleBenchConfig,
    drawn: Sequence[torch.Tensor],
    ours: LayerReplicas,
    none: LayerReplicas,
) -> Iterator[dict[str, Any]]:
    """A row for each policy on the same batches."""
    on_device = [ids_TK.to(config.device) for ids_TK in drawn]
    table, none_table = _to_device(ours, config.device), _to_device(none, config.device)
    none_a_max = _a_max([_schedule(config, ids, none_table, "first") for ids in on_device])
    exact_a_max = _a_max([_schedule(config, ids, table, "exact") for ids in on_device])
    proven = drawn[: config.proven]
    optimum = [least_a_max(np.unique(ids_TK.numpy()), ours) for ids_TK in proven]
    for policy in POLICIES:
        chosen = [_schedule(config, ids, table, policy) for ids in on_device]
        a_max = _a_max(chosen)
        at_flow = a_max[: len(optimum)].sum() / sum(optimum) if optimum else None
        yield {
            "policy": policy,
            "a_max": round(float(a_max.mean()), 3),
            "a_max_p99": round(float(np.percentile(a_max, 99)), 2),
            "against_exact": round(float(a_max.sum() / exact_a_max.sum()), 4),
            "against_flow": at_flow and round(float(at_flow), 4),
            "against_none": round(float(a_max.sum() / none_a_max.sum()), 4),
            "us": round(_time_us(config, on_device, table, policy), 2),
            "experts_read": round(
                float(np.mean([int(schedule.counts.experts_W.sum()) for schedule in chosen])), 2
            ),
        }


def _to_device(replicas: LayerReplicas, device: str) -> ReplicaTable:
    return replica_table(
        torch.from_numpy(replicas.slots_ER).to(device),
        num_workers=replicas.num_workers,
        slots_per_worker=replicas.slots_per_worker,
    )


def _schedule(
    config: ScheduleBenchConfig, ids_TK: torch.Tensor, table: ReplicaTable, policy: SchedulePolicy
) -> ActivationSchedule:
    return activation_schedule(
        ids_TK,
        table,
        Policy[policy.upper()],
        costs_ps=(round(1e6 * config.expert_us), round(1e6 * config.pair_us)),
        seed=config.seed,
    )


def _a_max(chosen: Sequence[ActivationSchedule]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array([int(schedule.counts.a_max) for schedule in chosen], dtype=np.int64)


def _time_us(
    config: ScheduleBenchConfig,
    drawn: Sequence[torch.Tensor],
    table: ReplicaTable,
    policy: SchedulePolicy,
) -> float:
    """Median time of a call: of its replay in a graph on a GPU, of the whole call on a CPU."""
    if config.device == "cuda":
        return statistics.median(_replay_us(config, ids_TK, table, policy) for ids_TK in drawn[:5])
    times: list[float] = []
    for ids_TK in drawn[:50]:
        start = time.perf_counter()
        _schedule(config, ids_TK, table, policy)
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def _replay_us(
    config: ScheduleBenchConfig, ids_TK: torch.Tensor, table: ReplicaTable, policy: SchedulePolicy
) -> float:
    """Mean over a graph of many launches, so that starting the replay hardly counts."""
    launches = 20
    _schedule(config, ids_TK, table, policy)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            _schedule(config, ids_TK, table, policy)
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * float(start.elapsed_time(end)) / launches


def _table(shape: str, rows: Sequence[dict[str, Any]], workers: int) -> Table:
    """A row for each share of slots and batch size, with this number of workers."""
    others = [policy for policy in POLICIES if policy not in ("auto", "exact")]
    table = Table(
        title=f"{shape} on {workers} workers: mean a_max of exact, its ratio to no replication, "
        "the others' ratio to exact, us of one call of exact",
        padding=(0, 0, 0, 1),
    )
    for head in ("slots", "batch", "exact", "/ none", *others, "us"):
        table.add_column(head, justify="right", no_wrap=True)
    cells = {
        (row["slots"], row["batch"], row["policy"]): row
        for row in rows
        if row["workers"] == workers
    }
    for slots, batch in dict.fromkeys(key[:2] for key in cells):
        exact = cells[slots, batch, "exact"]
        table.add_row(
            f"{slots:g}x",
            str(batch),
            f"{exact['a_max']:.2f}",
            f"{exact['against_none']:.2f}",
            *(f"{cells[slots, batch, policy]['against_exact']:.3f}" for policy in others),
            f"{exact['us']:.0f}",
        )
    return table


def _draw(
    config: ScheduleBenchConfig, rows: Sequence[dict[str, Any]], workers: int, path: Path
) -> None:
    slots = 1.25 if 1.25 in config.slots else config.slots[-1]
    shown = [row for row in rows if (row["workers"], row["slots"]) == (workers, slots)]
    panels = {
        shape: [row for row in shown if row["shape"] == shape and row["policy"] != "auto"]
        for shape in config.shapes
    }
    title = f"most experts read by one of {workers} workers, {slots:g}x slots"
    draw_schedules(path, title, {name: line for name, line in panels.items() if line})
