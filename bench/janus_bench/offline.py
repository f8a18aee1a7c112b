"""`janus bench offline`: tokens per second without a network front end, all contenders in one run.

Contenders: transformers with each of its experts implementations, Janus in one process (`local`),
and Janus with attention and experts in two processes (`gloo`). They take turns batch by batch, so
that a drift of the machine's speed hits all alike; medians over the rounds are reported.
"""

import dataclasses
import random
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from janus_bench.checkpoints import BENCH_MODEL, write_random_checkpoint
from janus_bench.contenders import DTYPES, Contender, ContenderConfig, Timing
from janus_bench.report import RESULTS, check_output, environment, write_result
from janus_server.bounds import Between, Threads
from janus_server.comm.config import MAX_LANES
from janus_server.command_line import parse
from janus_server.errors import ConfigError
from janus_server.model.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class OfflineConfig:
    """Measure prefill and decode tokens/s of Janus, one process against two, and transformers.

    All contenders get the same prompts on the same checkpoint, turn by turn in one run.
    """

    checkpoint: str = ""
    """Model folder; empty: a random Qwen3-MoE of 120 M parameters made for the run."""

    dtypes: tuple[str, ...] = ("bf16", "fp32")
    """Number formats to measure."""

    batches: Annotated[tuple[int, ...], Between(1, 2**16)] = (1, 8, 32)
    """Requests at once."""

    prompt_tokens: Annotated[int, Between(1, 2**20)] = 128
    """Tokens of each prompt."""

    new_tokens: Annotated[int, Between(2, 2**20)] = 64
    """Tokens generated for each; the first is prefill, the others are decode."""

    rounds: Annotated[int, Between(1, 1000)] = 3
    """Times each batch is measured, after one warm-up."""

    threads: Threads = 2
    """CPU threads of each contender; the two processes of gloo share them."""

    experts_implementations: tuple[str, ...] = ("grouped_mm", "eager")
    """How transformers runs experts; each way is a contender, none leaves transformers out."""

    lanes: Annotated[tuple[int, ...], Between(1, MAX_LANES)] = (1, 2)
    """Micro-batches of a step over gloo; each number is a contender."""

    output: str = ""
    """JSON file for the result; empty: offline-cpu.json beside the committed results."""


def command(argv: Sequence[str]) -> int:
    """Measure tokens/s of prefill and decode against transformers."""
    config = parse(OfflineConfig, argv, prog="janus bench offline")
    output = Path(config.output) if config.output else RESULTS / "offline-cpu.json"
    _check(config, output)
    console = Console()
    measured_in = environment()  # before a file can change
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(config.checkpoint or scratch)
        if not config.checkpoint:
            write_random_checkpoint(checkpoint, dict(BENCH_MODEL))
        spec = Checkpoint.open(checkpoint).spec
        needed = config.prompt_tokens + config.new_tokens
        if needed > spec.max_context:
            raise ConfigError(
                f"--prompt-tokens and --new-tokens are {needed} together, more than the model's "
                f"context of {spec.max_context}"
            )
        rows: list[dict[str, Any]] = []
        for dtype in config.dtypes:
            rows += _measure(config, str(checkpoint), dtype, spec.vocab_size, console)
    _print_table(console, rows)
    write_result(
        output,
        {
            "environment": measured_in,
            "configuration": dataclasses.asdict(config),
            "results": rows,
        },
    )
    console.print(f"written to {output}")
    return 0


def _check(config: OfflineConfig, output: Path) -> None:
    unknown = set(config.dtypes) - set(DTYPES)
    if unknown:
        raise ConfigError(f"--dtypes must be of {', '.join(DTYPES)}, not {min(unknown)}")
    if not (config.dtypes and config.batches):
        raise ConfigError("--dtypes and --batches each need a value")
    check_output("output", str(output))


def _contenders(config: OfflineConfig, checkpoint: str, dtype: str) -> list[ContenderConfig]:
    plain = ContenderConfig(
        name="local",
        checkpoint=checkpoint,
        dtype=dtype,
        threads=config.threads,
    )
    return [
        *(
            dataclasses.replace(plain, name="transformers", experts_implementation=implementation)
            for implementation in config.experts_implementations
        ),
        plain,
        *(dataclasses.replace(plain, name="gloo", lanes=lanes) for lanes in config.lanes),
    ]


def _measure(
    config: OfflineConfig, checkpoint: str, dtype: str, vocab_size: int, console: Console
) -> list[dict[str, Any]]:
    configs = _contenders(config, checkpoint, dtype)
    turns = len(config.batches) * (config.rounds + 1) * len(configs)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(*columns, console=console, transient=True))
        task = progress.add_task(f"{dtype}: starting", total=turns)
        contenders = []
        for contender_config in configs:
            contenders.append(Contender(contender_config))
            stack.callback(contenders[-1].close)
        rows: list[dict[str, Any]] = []
        for batch in config.batches:
            rng = random.Random(batch)
            prompts = [
                [rng.randrange(vocab_size) for _ in range(config.prompt_tokens)]
                for _ in range(batch)
            ]
            timings: list[list[Timing]] = [[] for _ in contenders]
            for _ in range(config.rounds + 1):
                for contender, measured in zip(contenders, timings, strict=True):
                    progress.update(
                        task, description=f"{dtype}, batch {batch}: {_label(contender.config)}"
                    )
                    measured.append(contender.run(prompts, config.new_tokens))
                    progress.advance(task)
            local = next(
                measured[0]
                for contender, measured in zip(contenders, timings, strict=True)
                if contender.config.name == "local"
            )
            rows += [
                _row(config, contender.config, batch, measured[1:], local)
                for contender, measured in zip(contenders, timings, strict=True)
            ]
    return rows


def _label(config: ContenderConfig) -> str:
    lanes = f"{config.lanes} lanes" if config.lanes > 1 else ""
    return f"{config.name} {config.experts_implementation}{lanes}".strip()


def _row(
    config: OfflineConfig,
    contender: ContenderConfig,
    batch: int,
    timings: Sequence[Timing],
    reference: Timing,
) -> dict[str, Any]:
    prefill = [batch * config.prompt_tokens / timing.prefill_s for timing in timings]
    decode = [batch * (config.new_tokens - 1) / timing.decode_s for timing in timings]
    whole = [batch * config.new_tokens / (timing.prefill_s + timing.decode_s) for timing in timings]
    pairs = [
        ours == theirs
        for ours_T, theirs_T in zip(timings[-1].token_ids, reference.token_ids, strict=True)
        for ours, theirs in zip(ours_T, theirs_T, strict=True)
    ]
    return {
        "dtype": contender.dtype,
        "batch": batch,
        "contender": _label(contender),
        "prefill_tokens_per_s": round(statistics.median(prefill), 1),
        "decode_tokens_per_s": round(statistics.median(decode), 1),
        "end_to_end_tokens_per_s": round(statistics.median(whole), 1),
        "decode_rounds": [round(value, 1) for value in decode],
        # Random weights in bf16 leave near-ties: continuations drift apart after the first flip.
        "same_tokens_as_local": round(sum(pairs) / len(pairs), 3),
    }


def _print_table(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title="tokens/s (median of the rounds)")
    for name in ("dtype", "batch", "contender", "prefill", "decode", "end to end", "decode ratio"):
        table.add_column(name, justify="left" if name in ("dtype", "contender") else "right")
    for row in rows:
        table.add_row(
            row["dtype"],
            str(row["batch"]),
            row["contender"],
            f"{row['prefill_tokens_per_s']:.0f}",
            f"{row['decode_tokens_per_s']:.0f}",
            f"{row['end_to_end_tokens_per_s']:.0f}",
            _ratio(rows, row),
        )
    console.print(table)


def _ratio(rows: Sequence[dict[str, Any]], row: dict[str, Any]) -> str:
    """Local against the best of transformers, gloo against local."""
    alike = [
        other for other in rows if (other["dtype"], other["batch"]) == (row["dtype"], row["batch"])
    ]
    against = {
        "local": [other for other in alike if other["contender"].startswith("transformers")],
        "gloo": [other for other in alike if other["contender"] == "local"],
    }.get(row["contender"].partition(" ")[0], [])
    if not against:
        return ""
    best = max(against, key=lambda other: float(other["decode_tokens_per_s"]))
    ratio = row["decode_tokens_per_s"] / best["decode_tokens_per_s"]
    return f"{ratio:.2f}x {best['contender']}"
