"""`janus demo`: serve the bundled checkpoint and stream several prompts at once."""

import asyncio
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated

import grpc.aio
import uvloop
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from janus_proto.v1 import control_pb2, inference_pb2
from janus_proto.v1.control_pb2_grpc import ControlServiceStub
from janus_proto.v1.inference_pb2_grpc import InferenceServiceStub
from janus_scheduler.request import MAX_TEMPERATURE
from janus_server.bounds import Between
from janus_server.cluster import Cluster, running_cluster
from janus_server.cluster_plan import check_config
from janus_server.command_line import parse
from janus_server.config import ServeConfig
from janus_server.controller.config import PoolConfig
from janus_server.controller.membership import HEARTBEAT_INTERVAL_S
from janus_server.endpoint.config import AdmissionConfig
from janus_server.errors import ConfigError, JanusError, UnavailableError
from janus_server.grpc_server import channel_options
from janus_server.input_file import is_there
from janus_server.launch import describe_worker, startup_progress
from janus_server.model.checkpoint import Checkpoint
from janus_server.model.config import ModelConfig
from janus_server.telemetry import configure_logging

DEMO_CHECKPOINT = Path(__file__).parent / "demo_checkpoint"
"""A Qwen3-MoE of 6 M parameters trained by train_demo.py on the standard library's text."""

PROMPTS = (
    "class QueueTest(unittest.TestCase):",
    "def read_lines(path):",
    "if __name__ ==",
    "The following functions",
    "    def test_read",
    "Return the",
)
"""No prompt ends in white space, which the tokenizer would join to what follows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """Serve the bundled checkpoint on this machine and stream several prompts at once.

    Starts one endpoint, one controller, 1 attention worker and 2 expert workers as separate
    processes, prints what they generate and how long it took, and ends them again.
    """

    checkpoint: str = str(DEMO_CHECKPOINT)
    """Model folder to serve instead."""

    attention_workers: Annotated[int, Between(1, 1024)] = 1
    """Attention workers."""

    expert_workers: Annotated[int, Between(1, 1024)] = 2
    """Expert workers."""

    max_tokens: Annotated[int, Between(1, 2**31 - 1)] = 96
    """Tokens to generate for each prompt."""

    temperature: Annotated[float, Between(0, MAX_TEMPERATURE)] = 0.8
    """0 takes the most likely token."""

    seed: Annotated[int, Between(0, 2**62)] = 0
    """Seed of the first prompt; the others count up from it."""


@dataclass(kw_only=True, slots=True)
class _Stream:
    """A prompt and what was generated from it so far."""

    prompt: str
    text: str = ""
    start_s: float = 0.0
    first_s: float = 0.0
    end_s: float = 0.0
    usage: inference_pb2.Usage = field(default_factory=inference_pb2.Usage)

    @property
    def tpot_ms(self) -> float:
        return 1e3 * (self.end_s - self.first_s) / max(self.usage.completion_tokens - 1, 1)


def command(argv: Sequence[str]) -> int:
    """Serve the bundled checkpoint and stream some prompts: see it work in a minute."""
    demo = parse(DemoConfig, argv, prog="janus demo")
    configure_logging("demo", "warning")
    config = ServeConfig(
        model=ModelConfig(checkpoint=demo.checkpoint),
        pools=PoolConfig(
            attention_workers=demo.attention_workers, expert_workers=demo.expert_workers
        ),
        admission=AdmissionConfig(listen="127.0.0.1:0"),
    )
    _check(demo, check_config(config))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_demo(demo, config, Console()))
    return 0


def _check(demo: DemoConfig, checkpoint: Checkpoint) -> None:
    if not is_there(checkpoint.path / "tokenizer.json"):
        raise ConfigError(f"{demo.checkpoint} has no tokenizer.json, and the prompts are texts")
    context = checkpoint.spec.max_context
    if demo.max_tokens >= context:
        raise ConfigError(
            f"--max-tokens must be less than the model's context of {context}, not "
            f"{demo.max_tokens}"
        )


async def _demo(demo: DemoConfig, config: ServeConfig, console: Console) -> None:
    streams = [_Stream(prompt=prompt) for prompt in PROMPTS]
    with tempfile.TemporaryFile() as logs:
        try:
            loads = await _serve_and_generate(demo, config, console, streams, logs)
        except JanusError:
            logs.seek(0)
            console.print(logs.read().decode(), markup=False, highlight=False)
            raise
    console.print(_request_table(streams), _expert_table(loads))
    console.print("all processes have ended")


async def _serve_and_generate(
    demo: DemoConfig,
    config: ServeConfig,
    console: Console,
    streams: Sequence[_Stream],
    logs: IO[bytes],
) -> control_pb2.GetExpertLoadsResponse:
    async with AsyncExitStack() as stack:
        with startup_progress(config) as advance:

            def on_worker_ready(worker: control_pb2.Worker) -> None:
                print(describe_worker(worker))
                advance()

            cluster = await stack.enter_async_context(
                running_cluster(config, on_worker_ready=on_worker_ready, stderr=logs)
            )
            advance()
        console.print(f"ready {cluster.address}: {len(streams)} prompts at once", highlight=False)
        await cluster.unless_failed(_generate_all(demo, cluster.address, streams, console))
        return await _expert_loads(cluster)


async def _generate_all(
    demo: DemoConfig, address: str, streams: Sequence[_Stream], console: Console
) -> None:
    async with grpc.aio.insecure_channel(address, options=channel_options()) as channel:
        with _shown(streams, console) as refresh:
            await asyncio.gather(
                *(
                    _generate(demo, channel, stream, demo.seed + index, refresh)
                    for index, stream in enumerate(streams)
                )
            )


async def _generate(
    demo: DemoConfig, channel: grpc.aio.Channel, stream: _Stream, seed: int, refresh: "_Refresh"
) -> None:
    request = inference_pb2.GenerateRequest(
        text=stream.prompt,
        sampling=inference_pb2.SamplingParams(
            temperature=demo.temperature, max_tokens=demo.max_tokens, seed=seed, top_p=0.95
        ),
    )
    stream.start_s = time.perf_counter()
    try:
        async for response in InferenceServiceStub(channel).Generate(request, timeout=120):
            if response.token_ids and not stream.first_s:
                stream.first_s = time.perf_counter()
            stream.text += response.text
            stream.usage = response.usage
            refresh(stream)
    except grpc.aio.AioRpcError as error:
        raise UnavailableError(f"the endpoint failed: {error.details()}") from None
    stream.end_s = time.perf_counter()


class _Refresh:
    """Shows streams as they grow: panels on a terminal, whole lines elsewhere."""

    def __init__(self, streams: Sequence[_Stream], console: Console, live: Live | None) -> None:
        self._streams = streams
        self._console = console
        self._live = live
        self._shown = [0] * len(streams)

    def __call__(self, stream: _Stream) -> None:
        if self._live is not None:
            self._live.update(self.panels(lines=4))
            return
        # By identity: two streams of the same prompt are equal.
        index = next(i for i, shown in enumerate(self._streams) if shown is stream)
        whole = stream.prompt + stream.text
        end = len(whole) if stream.usage.completion_tokens else whole.rfind("\n") + 1
        for line in whole[self._shown[index] : end].splitlines():
            self._console.print(Text(f"[{index + 1}] {line}"), soft_wrap=True)
        self._shown[index] = max(end, self._shown[index])

    def panels(self, *, lines: int | None = None) -> Group:
        """Every stream in a panel, its last `lines` lines or all."""
        return Group(
            *(
                Panel(_tail(stream, lines), title=f"[{index + 1}]", title_align="left")
                for index, stream in enumerate(self._streams)
            )
        )


def _tail(stream: _Stream, lines: int | None) -> Text:
    text = Text(stream.prompt, style="bold") + Text(stream.text)
    kept = text.split("\n", allow_blank=True)
    return Text("\n").join(kept[-lines:] if lines else kept)


@contextmanager
def _shown(streams: Sequence[_Stream], console: Console) -> Iterator[_Refresh]:
    if not console.is_terminal:
        yield _Refresh(streams, console, None)
        return
    with Live(console=console, refresh_per_second=12, transient=True) as live:
        refresh = _Refresh(streams, console, live)
        yield refresh
    console.print(refresh.panels())


async def _expert_loads(cluster: Cluster) -> control_pb2.GetExpertLoadsResponse:
    # Totals come with heartbeats: after this time each worker has sent its final ones.
    await asyncio.sleep(1.5 * HEARTBEAT_INTERVAL_S)
    async with grpc.aio.insecure_channel(cluster.controller, options=channel_options()) as channel:
        return await ControlServiceStub(channel).GetExpertLoads(
            control_pb2.GetExpertLoadsRequest(), metadata=cluster.secret.metadata, timeout=10
        )


def _request_table(streams: Sequence[_Stream]) -> Table:
    tokens = sum(stream.usage.completion_tokens for stream in streams)
    seconds = max(stream.end_s for stream in streams) - min(stream.start_s for stream in streams)
    table = Table(title=f"{tokens / seconds:.0f} tokens/s over all requests")
    for name in ("request", "prompt tokens", "new tokens", "TTFT ms", "TPOT ms", "tokens/s"):
        table.add_column(name, justify="right")
    for index, stream in enumerate(streams):
        table.add_row(
            str(index + 1),
            str(stream.usage.prompt_tokens),
            str(stream.usage.completion_tokens),
            f"{1e3 * (stream.first_s - stream.start_s):.0f}",
            f"{stream.tpot_ms:.1f}",
            f"{stream.usage.completion_tokens / (stream.end_s - stream.start_s):.0f}",
        )
    return table


def _expert_table(loads: control_pb2.GetExpertLoadsResponse) -> Table:
    # All workers count the same totals by layer, so the first worker speaks for all.
    layers = [layer for worker in loads.loads[:1] for layer in worker.load.layers]
    steps = max(sum(layer.num_steps for layer in layers), 1)
    a_max = sum(layer.sum_a_max for layer in layers) / steps
    table = Table(title=f"per MoE layer and step; a_max {a_max:.1f}")
    for name in ("expert worker", "activated experts", "tokens x experts"):
        table.add_column(name, justify="right")
    for worker in loads.loads:
        units = max(worker.load.num_layer_steps, 1)
        table.add_row(
            worker.worker_id,
            f"{worker.load.num_activated_experts / units:.1f}",
            f"{worker.load.num_token_pairs / units:.1f}",
        )
    return table
