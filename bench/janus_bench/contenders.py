"""The engines that `janus bench offline` compares, each in a process of its own.

A contender process waits for a batch to run; while one contender is measured, the others wait.
"""

import contextlib
import multiprocessing
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from janus_scheduler.activation import ActivationCosts, Scheduling
from janus_scheduler.placement import round_robin
from janus_scheduler.request import SamplingParams
from janus_server.attention.config import EngineConfig
from janus_server.attention.engine import Engine
from janus_server.attention.weights import load_attention_weights
from janus_server.comm.base import ExpertPool
from janus_server.comm.epoch import GroupConfig
from janus_server.comm.gloo import GlooAttentionPool, GlooExpertPool
from janus_server.comm.gloo_group import join_group
from janus_server.comm.local import LocalExpertPool
from janus_server.errors import JanusError
from janus_server.experts.runner import ExpertRunner
from janus_server.experts.weights import load_layers
from janus_server.model.checkpoint import Checkpoint
from janus_server.model.cpu import use_cpu
from janus_server.model.weights import WeightReader

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_CPU = torch.device("cpu")
_MAX_BATCH_TOKENS = 8192
_TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ContenderConfig:
    """What to run, and on what."""

    name: str
    """`transformers`, `local` or `gloo`."""
    checkpoint: str
    """Model folder."""
    dtype: str
    """`bf16` or `fp32`."""
    threads: int
    """CPU threads; gloo gives half of them to each side, but at least one."""
    experts_implementation: str = ""
    """How transformers runs experts."""
    lanes: int = 1
    """Micro-batches of Janus' steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """One batch, measured."""

    prefill_s: float
    """Until every request has its first token."""
    decode_s: float
    """From then until every request has its last token."""
    token_ids: tuple[tuple[int, ...], ...]
    """New tokens of each request."""


class Contender:
    """A contender process; `close` it."""

    def __init__(self, config: ContenderConfig) -> None:
        context = multiprocessing.get_context("spawn")
        self.config = config
        self._connection, theirs = context.Pipe()
        # Not a daemon: daemons may not start processes, and the gloo contender starts one.
        self._process = context.Process(target=_contend, args=(config, theirs))
        self._process.start()
        theirs.close()

    def run(self, prompts: Sequence[Sequence[int]], num_new: int) -> Timing:
        """Decode all prompts at once, greedily, `num_new` tokens each.

        Raises JanusError where the process fails or takes too long.
        """
        try:
            self._connection.send((prompts, num_new))
            if not self._connection.poll(_TIMEOUT_S):
                answer: Timing | str = f"it did not finish a batch in {_TIMEOUT_S:g} s"
            else:
                answer = self._connection.recv()
        except (EOFError, ConnectionError):
            answer = "its process has ended"
        if isinstance(answer, str):
            raise JanusError(f"the contender {self.config.name} failed: {answer}")
        return answer

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


class _Runner(ABC):
    """What runs inside a contender process."""

    @abstractmethod
    def run(self, prompts: Sequence[Sequence[int]], num_new: int) -> Timing: ...

    def close(self) -> None:
        return


class _Transformers(_Runner):
    def __init__(self, config: ContenderConfig) -> None:
        from transformers import Qwen3MoeForCausalLM
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        torch.set_num_threads(config.threads)
        self._model: Any = Qwen3MoeForCausalLM.from_pretrained(
            config.checkpoint,
            dtype=DTYPES[config.dtype],
            experts_implementation=config.experts_implementation,
        ).eval()

    def run(self, prompts: Sequence[Sequence[int]], num_new: int) -> Timing:
        ids = torch.tensor(prompts)
        options: dict[str, Any] = {
            "do_sample": False,
            "eos_token_id": None,
            "pad_token_id": 0,
            "attention_mask": torch.ones_like(ids),
        }
        token_times: list[float] = []

        def note_time(*_: Any, **__: Any) -> torch.Tensor:
            token_times.append(time.perf_counter())
            return torch.zeros(len(prompts), dtype=torch.bool)

        start = time.perf_counter()
        # transformers calls stopping criteria after each token: this one only notes the time.
        result = self._model.generate(
            ids, max_new_tokens=num_new, stopping_criteria=[note_time], **options
        )
        return Timing(
            prefill_s=token_times[0] - start,
            decode_s=token_times[-1] - token_times[0],
            token_ids=tuple(map(tuple, result[:, ids.shape[1] :].tolist())),
        )


class _Janus(_Runner):
    """Our engine; subclasses add the experts."""

    pool: ExpertPool

    def __init__(self, config: ContenderConfig, threads: int) -> None:
        use_cpu(threads)
        self.checkpoint = Checkpoint.open(config.checkpoint)
        with WeightReader(self.checkpoint, dtype=DTYPES[config.dtype], device=_CPU) as reader:
            weights = load_attention_weights(reader)
        engine_config = EngineConfig(
            max_batch_tokens=_MAX_BATCH_TOKENS, lanes=config.lanes, kv_cache_gib=1.0
        )
        self._engine = Engine(self.checkpoint.spec, weights, engine_config)

    def run(self, prompts: Sequence[Sequence[int]], num_new: int) -> Timing:
        params = SamplingParams(temperature=0.0, max_tokens=num_new)
        outputs: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
        start = time.perf_counter()
        for index, prompt in enumerate(prompts):
            self._engine.add(str(index), tuple(prompt), params)
        while not all(outputs.values()):
            self._step(outputs)
        prefilled_at = time.perf_counter()
        while self._engine.has_work:
            self._step(outputs)
        self.pool.idle()
        return Timing(
            prefill_s=prefilled_at - start,
            decode_s=time.perf_counter() - prefilled_at,
            token_ids=tuple(map(tuple, outputs.values())),
        )

    def _step(self, outputs: dict[str, list[int]]) -> None:
        outcome = self._engine.step(self.pool)
        assert not outcome.failures, outcome.failures
        for output in outcome.outputs:
            outputs[output.request_id].append(output.token_id)


class _Local(_Janus):
    def __init__(self, config: ContenderConfig) -> None:
        super().__init__(config, config.threads)
        self.pool = LocalExpertPool([_expert_runner(self.checkpoint, config.dtype).partial])


class _Gloo(_Janus):
    """This process is the attention worker; a child is the expert worker."""

    def __init__(self, config: ContenderConfig) -> None:
        threads = max(config.threads // 2, 1)
        super().__init__(config, threads)
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        address = f"127.0.0.1:{self._store.port}"
        context = multiprocessing.get_context("spawn")
        self._expert = context.Process(
            target=_expert_worker, args=(config, _group(address, 1), threads), daemon=True
        )
        self._expert.start()
        group = _group(address, 0)
        self.pool = GlooExpertPool(join_group(group), group)

    def close(self) -> None:
        self.pool.close()
        self._expert.join(10)


def _group(store_address: str, rank: int) -> GroupConfig:
    return GroupConfig(
        store_address=store_address,
        own_host="127.0.0.1",
        prefix="bench",
        rank=rank,
        num_attention=1,
        num_experts=1,
        max_batch_tokens=(_MAX_BATCH_TOKENS,),
        timeout_s=_TIMEOUT_S,
        join_timeout_s=_TIMEOUT_S,
    )


def _expert_worker(config: ContenderConfig, group: GroupConfig, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    use_cpu(threads)
    checkpoint = Checkpoint.open(config.checkpoint)
    runner = _expert_runner(checkpoint, config.dtype)
    pool = GlooAttentionPool(
        join_group(group),
        group,
        hidden_size=checkpoint.spec.hidden_size,
        dtype=DTYPES[config.dtype],
        device=_CPU,
    )
    with torch.inference_mode():
        pool.serve(runner.partial, checkpoint.spec.moe_layers)


def _expert_runner(checkpoint: Checkpoint, dtype: str) -> ExpertRunner:
    spec = checkpoint.spec
    placement = round_robin(moe_layers=spec.moe_layers, num_experts=spec.num_experts, num_workers=1)
    with WeightReader(checkpoint, dtype=DTYPES[dtype], device=_CPU) as reader:
        layers = load_layers(reader, placement, 0)
    return ExpertRunner(spec, layers, worker=0, scheduling=_SCHEDULING)


_SCHEDULING = Scheduling(policy="first", costs=ActivationCosts(expert_ps=1, pair_ps=1))
"""With a single expert worker there is nothing to choose."""

_REFUSALS = (JanusError, ValueError, ImportError, OSError, MemoryError, RuntimeError)
"""What Janus, torch and transformers raise where they cannot do what flags or checkpoint say."""

_RUNNERS: dict[str, Any] = {"transformers": _Transformers, "local": _Local, "gloo": _Gloo}


def _contend(config: ContenderConfig, connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback on Ctrl-C
    with contextlib.suppress(EOFError, ConnectionError):  # the bench is done
        try:
            _answer(_RUNNERS[config.name](config), connection)
        except _REFUSALS as error:
            connection.send(f"{type(error).__name__}: {error}")
            while True:  # a process that ends with a batch unread loses what it has sent
                connection.recv()


def _answer(runner: _Runner, connection: Connection) -> None:
    try:
        while True:
            connection.send(runner.run(*connection.recv()))
    except EOFError:
        runner.close()
