"""The thread that runs the engine, and the queues between it and the event loop."""

import logging
import queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from janus_proto.v1 import worker_pb2
from janus_scheduler.request import SamplingParams
from janus_server.attention.engine import Engine, RequestFailure, TokenOutput
from janus_server.comm.base import ExpertPool

logger = logging.getLogger(__name__)


_Request = tuple[tuple[int, ...], SamplingParams]
_Queued = list[_Request]
"""A request, or nothing: whoever takes it out first, the engine or an abort, has it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one turn of the engine brought; published also where that is nothing but its load."""

    step: int
    outputs: Sequence[TokenOutput]
    aborted: Sequence[str]
    """Requests that were dropped as asked. Their KV blocks are free."""
    failures: Sequence[RequestFailure]
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
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._queued: dict[str, _Queued] = {}
        """Request id -> the request, until the engine takes it up."""
        self._aborted: list[str] = []
        self._refused: list[RequestFailure] = []
        """Both: not published yet."""
        self._num_idle_waits = 0
        self._stopping = False

    def run(self) -> None:
        """Run steps until `stop`; raises PeerLostError where the experts are lost."""
        while True:
            self._take_commands()
            if self._stopping:
                self._pool.close()
                return
            outcome = self._engine.step(self._pool)
            if not self._engine.has_work:
                self._check_integrity()
            self._publish(
                StepResult(
                    step=self._engine.steps,
                    outputs=outcome.outputs,
                    aborted=self._aborted,
                    failures=[*self._refused, *outcome.failures],
                    load=self.load(),
                )
            )
            self._aborted, self._refused = [], []

    def submit(self, request_id: str, prompt_ids: tuple[int, ...], params: SamplingParams) -> None:
        """Queue a request; one that cannot run comes back in StepResult.failures."""
        queued: _Queued = [(prompt_ids, params)]
        self._queued[request_id] = queued
        self._commands.put(lambda: self._add(request_id, queued))

    def abort(self, request_id: str) -> None:
        """Drop a request at the next step boundary; unknown ids do nothing."""
        # At once: the prompts of requests that come and go during a step would pile up.
        was_queued = _take(self._queued.pop(request_id, [])) is not None

        def drop() -> None:
            if was_queued or self._engine.abort(request_id):
                self._aborted.append(request_id)

        self._commands.put(drop)

    @property
    def progress(self) -> int:
        """Grows while the engine computes and while it waits for work; stands still if it hangs."""
        return self._engine.progress + self._num_idle_waits

    def load(self) -> worker_pb2.EngineLoad:
        """What the engine holds now."""
        batcher = self._engine.batcher
        return worker_pb2.EngineLoad(
            num_running=batcher.num_running,
            num_waiting=batcher.num_waiting,
            num_free_blocks=batcher.num_free_blocks,
            num_blocks=self._engine.num_blocks,
            max_context=self._engine.max_context,
            num_preemptions=batcher.num_preemptions,
        )

    def stop(self) -> None:
        """Ask `run` to return after the running step, dropping what is left."""
        self._commands.put(None)

    def _check_integrity(self) -> None:
        """Nobody has a request here; should blocks be missing even so, take new books."""
        try:
            self._engine.batcher.check_integrity()
        except AssertionError:
            self._engine.start_anew("the attention worker lost KV blocks")

    def _add(self, request_id: str, queued: _Queued) -> None:
        request = _take(queued)
        if request is None:
            return  # aborted meanwhile
        if self._queued.get(request_id) is queued:
            self._queued.pop(request_id, None)
        try:
            self._engine.add(request_id, *request)
        except ValueError as error:
            logger.error("refused a request: %s", error)
            reason = str(error)
        except Exception:
            logger.exception("cannot take up request %s", request_id)
            reason = "the attention worker could not take it up; its log says why"
        else:
            return
        self._refused.append(RequestFailure(request_id=request_id, reason=reason))

    def _take_commands(self) -> None:
        """Run the queued commands; while there is no work, wait for one and show signs of life."""
        while not self._stopping:
            idle = not (self._engine.has_work or self._aborted or self._refused)
            try:
                command = self._idle_wait() if idle else self._commands.get_nowait()
            except queue.Empty:
                return
            if command is None:
                self._stopping = True
            else:
                command()

    def _idle_wait(self) -> Callable[[], None] | None:
        while True:
            self._pool.idle()
            self._num_idle_waits += 1
            try:
                return self._commands.get(timeout=self._keepalive_s)
            except queue.Empty:
                continue


def _take(queued: _Queued) -> _Request | None:
    try:
        return queued.pop()
    except IndexError:
        return None
