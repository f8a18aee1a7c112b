"""Figures of placements and schedules, drawn by matplotlib without a display."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from janus_bench.routing_traces import RoutingSample
from janus_scheduler.activation import activated
from janus_scheduler.placement import EMPTY, Placement
from janus_scheduler.routing import expert_counts, sample_batches

matplotlib.rcParams.update({"font.size": 9, "svg.fonttype": "none"})

_MOST_LAYERS = 4


def draw_placement(
    path: Path,
    trace: RoutingSample,
    placement: Placement,
    *,
    batch_tokens: int,
    num_batches: int,
) -> None:
    """Draw, for up to four layers, how often workers read each expert, and the experts' loads."""
    layers = sorted(trace.layers)
    shown = [
        layers[i]
        for i in np.linspace(0, len(layers) - 1, min(len(layers), _MOST_LAYERS)).round().astype(int)
    ]
    figure = Figure(figsize=(10, 2.6 * len(shown) + 0.4), layout="constrained")
    axes = figure.subplots(len(shown), 2, squeeze=False, width_ratios=(3, 1))
    for layer, (heat, curve) in zip(shown, axes, strict=True):
        counts_E = expert_counts(trace.layers[layer], trace.num_experts)
        order = np.argsort(-counts_E, kind="stable")
        image = heat.imshow(
            _reads(trace, placement, layer, batch_tokens, num_batches)[:, order],
            aspect="auto",
            vmin=0,
            vmax=1,
            cmap="magma_r",
            interpolation="nearest",
        )
        figure.colorbar(image, ax=heat, label="share of batches")
        heat.set_title(f"layer {layer}: who reads which expert, batches of {batch_tokens} tokens")
        heat.set_ylabel("expert worker")
        heat.set_xlabel("experts, the busiest first")
        heat.set_yticks(range(placement.num_workers))
        curve.plot(counts_E[order] / counts_E.mean())
        curve.axhline(1, color="gray", linewidth=0.8)
        curve.set_title("tokens of an expert / mean")
        curve.set_xlabel("experts, the busiest first")
        curve.set_ylim(bottom=0)
    figure.savefig(path, dpi=130)


def _reads(
    trace: RoutingSample, placement: Placement, layer: int, batch_tokens: int, num_batches: int
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Share of batches in which a worker reads an expert, [W, E]; NaN where it holds no replica."""
    active_BE = sample_batches(
        trace.layers[layer],
        trace.num_experts,
        num_tokens=batch_tokens,
        num_batches=num_batches,
        seed=0,
    )
    replicas = placement.replicas(layer, trace.num_experts)
    _, chosen_BE = activated(active_BE, replicas)
    reads_WE = np.full((placement.num_workers, trace.num_experts), np.nan)
    for expert in range(trace.num_experts):
        for index, worker in enumerate(replicas.workers_ER[expert]):
            if worker != EMPTY:
                reads_WE[worker, expert] = (chosen_BE[:, expert] == index).mean()
    return reads_WE


def draw_schedules(path: Path, title: str, panels: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """Draw a_max, relative to no replication, over the batch size; a line for each policy.

    `panels` has the rows of each panel, with the keys `batch`, `policy` and `against_none`.
    """
    figure = Figure(figsize=(2.8 * len(panels) + 1, 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (name, rows) in zip(axes, panels.items(), strict=True):
        for policy in dict.fromkeys(row["policy"] for row in rows):
            points = [
                (row["batch"], row["against_none"]) for row in rows if row["policy"] == policy
            ]
            axis.plot(*zip(*points, strict=True), marker=".", label=policy)
        axis.axhline(1, color="gray", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_title(name)
        axis.set_xlabel("tokens of a batch")
    axes[0].set_ylabel("a_max / a_max without replicas")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
