"""`janus serve`: check, start, say what becomes ready, and end in order on a signal."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import uvloop
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from janus_proto.v1 import control_pb2
from janus_server.cluster import running_cluster
from janus_server.cluster_plan import check_config
from janus_server.command_line import parse
from janus_server.config import ServeConfig
from janus_server.process import on_stop_signals
from janus_server.standard_streams import say
from janus_server.telemetry import configure_logging

_ROLE_NAMES = {
    control_pb2.WORKER_ROLE_ATTENTION: "attention worker",
    control_pb2.WORKER_ROLE_EXPERT: "expert worker",
}


def command(argv: Sequence[str]) -> int:
    """Serve a checkpoint on this machine until Ctrl-C.

    Returns 0 after an orderly end, 128 and the number of a signal that came before it was ready;
    raises JanusError where it cannot start or a process is lost.
    """
    config = parse(ServeConfig, argv, prog="janus serve")
    configure_logging("serve", config.log_level)
    check_config(config)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        number = runner.run(_serve_until_signal(config))
    if number is None:
        return 0
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(f"janus: stopped by {number.name} before it was ready", file=sys.stderr)
    return 128 + number


def describe_worker(worker: control_pb2.Worker) -> str:
    """The line that `janus serve` prints for a worker that became ready."""
    where = f"pid {worker.pid}" + (f", {worker.address}" if worker.address else "")
    return f"{_ROLE_NAMES[worker.role]} {worker.worker_id} ready ({where})"


@contextlib.contextmanager
def startup_progress(config: ServeConfig) -> Iterator[Callable[[], None]]:
    """Show a bar on a terminal's standard error; call what it yields as each part gets ready."""
    num_parts = config.pools.attention_workers + 1
    if config.transport != "local":
        num_parts += config.pools.expert_workers
    progress = Progress(
        TextColumn("starting"),
        BarColumn(),
        TextColumn("{task.completed:.0f} of {task.total:.0f} ready"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
        disable=not sys.stderr.isatty(),
    )
    progress.start()
    try:
        bar = progress.add_task("starting", total=num_parts)
        yield lambda: progress.advance(bar)
    finally:
        with contextlib.suppress(OSError):  # the terminal may be gone
            progress.stop()


async def _serve_until_signal(config: ServeConfig) -> signal.Signals | None:
    """Returns the signal that ended the start; None where the server was ready."""
    ready, hurry = asyncio.Event(), asyncio.Event()
    stopping: asyncio.Future[signal.Signals] = asyncio.get_running_loop().create_future()

    def on_signal(number: signal.Signals) -> None:
        if stopping.done():
            hurry.set()
        else:
            stopping.set_result(number)

    on_stop_signals(on_signal)
    serving = asyncio.create_task(_serve(config, ready, hurry))
    either: list[asyncio.Future[Any]] = [serving, stopping]
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    serving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await serving
    return None if ready.is_set() else stopping.result()


async def _serve(config: ServeConfig, ready: asyncio.Event, hurry: asyncio.Event) -> None:
    async with contextlib.AsyncExitStack() as stack:
        with startup_progress(config) as advance:

            def on_worker_ready(worker: control_pb2.Worker) -> None:
                say(describe_worker(worker))
                advance()

            cluster = await stack.enter_async_context(
                running_cluster(config, on_worker_ready=on_worker_ready, hurry=hurry)
            )
            advance()
        ready.set()
        say(f"ready {cluster.address}")
        await cluster.wait_for_failure()
