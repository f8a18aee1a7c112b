import tracemalloc
from pathlib import Path

import pytest

from janus_scheduler.request import SamplingParams
from janus_server.attention.engine import Engine
from janus_server.attention.engine_thread import EngineThread, StepResult
from tests.conftest import CheckpointFactory
from tests.fakes.decoding import local_pool
from tests.fakes.engines import make_engine

PARAMS = SamplingParams(max_tokens=2, temperature=0.0)


@pytest.fixture(scope="module")
def folder(make_checkpoint: CheckpointFactory) -> Path:
    return make_checkpoint()


def engine_thread(folder: Path, engine: Engine, results: list[StepResult]) -> EngineThread:
    """One that stops once a request has all its tokens."""

    def publish(result: StepResult) -> None:
        results.append(result)
        if any(output.finish_reason for output in result.outputs):
            thread.stop()

    thread = EngineThread(engine, local_pool(folder, 1), publish=publish, keepalive_s=1)
    return thread


def test_an_abort_drops_what_was_submitted_before_it_alone(folder: Path) -> None:
    results: list[StepResult] = []
    thread = engine_thread(folder, make_engine(folder), results)
    thread.submit("mine", (5, 6), PARAMS)
    thread.abort("mine")
    thread.submit("mine", (7,), PARAMS)
    thread.abort("unknown")
    thread.run()
    assert [request_id for result in results for request_id in result.aborted] == ["mine"]
    assert sum(len(result.outputs) for result in results) == PARAMS.max_tokens


def test_requests_that_come_and_go_during_a_step_hold_no_prompts(folder: Path) -> None:
    thread = engine_thread(folder, make_engine(folder), [])
    num_tokens = 10_000

    def come_and_go(number: int) -> None:
        thread.submit(str(number), tuple(range(1000, 1000 + num_tokens)), PARAMS)
        thread.abort(str(number))

    come_and_go(0)
    tracemalloc.start()
    try:
        for number in range(1, 51):
            come_and_go(number)
        assert tracemalloc.get_traced_memory()[0] < 8 * num_tokens
    finally:
        tracemalloc.stop()
