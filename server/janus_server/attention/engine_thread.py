"""The thread that runs the engine, and the queues between it and the event loop."""

import logging
import queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from janus_proto.v1 import worker_pb2
from janus_scheduler.request import SamplingParams
from janus_server.attention.engine import Engine, TokenOutput
from janus_server.comm.base import ExpertPool

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one turn of the engine brought."""

    step: int
    outputs: Sequence[TokenOutput]
    ended: Sequence[str]
    """Requests that ended without a token: aborted or refused. Their KV blocks are free."""
    load: worker_pb2.EngineLoad


class EngineThread:
    """Owns the engine: takes commands at step boundaries and publishes every step's result.

    `run` is for a thread of its own; the other methods are for the event loop.
    """

    def __init__(
        self,
        engine: Engine,
        pool: ExpertPool,
        *,
        publish: Callable[[StepResult], None],
        keepalive_s: float,
    ) -> None:
        """`publish` is called from the engine's thread."""
        self._engine = engine
        self._pool = pool
        self._publish = publish
        self._keepalive_s = keepalive_s
        self._commands: queue.SimpleQueue[Callable[[], str | None] | None] = queue.SimpleQueue()
        self._stopping = False

    def run(self) -> None:
        """Run steps until `stop`; raises what the engine raises."""
        while True:
            ended = self._take_commands()
            if self._stopping:
                self._pool.close()
                return
            outputs = self._engine.step(self._pool) if self._engine.has_work else []
            if not self._engine.has_work:
                self._engine.batcher.check_integrity()
            if outputs or ended:
                self._publish(
                    StepResult(
                        step=self._engine.steps, outputs=outputs, ended=ended, load=self.load()
                    )
                )

    def submit(self, request_id: str, prompt_ids: tuple[int, ...], params: SamplingParams) -> None:
        """Queue a request; one that cannot run comes back in StepResult.ended."""

        def add() -> str | None:
            try:
                self._engine.add(request_id, prompt_ids, params)
            except ValueError as error:
                logger.error("refused a request: %s", error)
                return request_id
            return None

        self._commands.put(add)

    def abort(self, request_id: str) -> None:
        """Drop a request at the next step boundary; unknown ids do nothing."""
        self._commands.put(lambda: request_id if self._engine.abort(request_id) else None)

    def load(self) -> worker_pb2.EngineLoad:
        """What the engine holds now."""
        batcher = self._engine.batcher
        return worker_pb2.EngineLoad(
            num_running=batcher.num_running,
            num_waiting=batcher.num_waiting,
            num_free_blocks=batcher.num_free_blocks,
            num_blocks=self._engine.num_blocks,
            block_size=batcher.block_size,
            num_preemptions=batcher.num_preemptions,
        )

    def stop(self) -> None:
        """Ask `run` to return after the running step, dropping what is left."""
        self._commands.put(None)

    def _take_commands(self) -> list[str]:
        """Run the queued commands; while there is no work, wait for one and show signs of life."""
        ended: list[str] = []
        while True:
            idle = not self._engine.has_work and not ended
            try:
                command = self._idle_wait() if idle else self._commands.get_nowait()
            except queue.Empty:
                return ended
            if command is None:
                self._stopping = True
                return ended
            request_id = command()
            if request_id is not None:
                ended.append(request_id)

    def _idle_wait(self) -> Callable[[], str | None] | None:
        while True:
            self._pool.idle()
            try:
                return self._commands.get(timeout=self._keepalive_s)
            except queue.Empty:
                continue
