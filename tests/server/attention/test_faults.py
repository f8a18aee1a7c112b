"""A fault ends the requests that it concerns, and nothing else."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from janus_scheduler.request import SamplingParams
from janus_server.attention.engine import Engine, RequestFailure
from janus_server.attention.weights import AttentionWeights
from janus_server.comm.base import DispatchHandle, ExpertPool
from janus_server.comm.local import LocalExpertPool
from janus_server.errors import PeerLostError
from janus_server.model.checkpoint import Checkpoint
from tests.conftest import CheckpointFactory
from tests.fakes.decoding import expert_runners, local_pool
from tests.fakes.engines import POISONED_TOKEN, load_weights, make_engine, poisoned_weights
from tests.fakes.gloo_group import attention_side, group_configs, in_thread, serve_experts

PROMPTS = {"a": (5, 99, 14), "b": (7, 7, 30, 31), "c": (1,)}
NUM_NEW = 6


@pytest.fixture(scope="module")
def folder(make_checkpoint: CheckpointFactory) -> Path:
    return make_checkpoint()


@pytest.fixture(scope="module")
def right(folder: Path) -> dict[str, list[int]]:
    """What each prompt becomes where nothing fails."""
    engine = make_engine(folder)
    add(engine)
    tokens, failures = run(engine, local_pool(folder, 2))
    assert not failures
    return tokens


def broken_weights(folder: Path, layer: int) -> AttentionWeights:
    """The attention of one layer cannot be computed."""
    weights = load_weights(folder)
    layers = list(weights.layers)
    layers[layer] = dataclasses.replace(layers[layer], attention_norm_H=torch.ones(1, 2, 3))
    return dataclasses.replace(weights, layers=tuple(layers))


def params(**changes: object) -> SamplingParams:
    return SamplingParams(**{"max_tokens": NUM_NEW, "temperature": 0.0, **changes})


def add(engine: Engine) -> None:
    for request_id, prompt in PROMPTS.items():
        engine.add(request_id, prompt, params())


def run(engine: Engine, pool: ExpertPool) -> tuple[dict[str, list[int]], dict[str, RequestFailure]]:
    """Run until there is no work; the tokens and failures of each request."""
    tokens: dict[str, list[int]] = {}
    failures: dict[str, RequestFailure] = {}
    while engine.has_work:
        outcome = engine.step(pool)
        failures |= {failure.request_id: failure for failure in outcome.failures}
        for output in outcome.outputs:
            tokens.setdefault(output.request_id, []).append(output.token_id)
    engine.batcher.check_integrity()
    assert engine.batcher.num_free_blocks == engine.num_blocks
    return tokens, failures


class FailingPool:
    """Passes everything on to another pool, but for one combine, which fails."""

    def __init__(self, pool: ExpertPool, fails_at: int) -> None:
        self._pool = pool
        self._fails_at = fails_at
        self._num_combines = 0
        self.announced: list[tuple[int, ...]] = []
        self.dispatched: list[tuple[int, int, int]] = []
        """(layer, lane, tokens)."""

    def begin_step(self, lane_tokens: Sequence[int]) -> None:
        self.announced.append(tuple(lane_tokens))
        self._pool.begin_step(lane_tokens)

    def dispatch(self, layer: int, lane: int, hidden_TH: torch.Tensor) -> DispatchHandle:
        self.dispatched.append((layer, lane, len(hidden_TH)))
        return self._pool.dispatch(layer, lane, hidden_TH)

    def combine(self, handle: DispatchHandle) -> torch.Tensor:
        self._num_combines += 1
        if self._num_combines == self._fails_at:
            raise RuntimeError("injected")
        return self._pool.combine(handle)

    def idle(self) -> None: ...

    def close(self) -> None: ...

    def abandon(self) -> None: ...


def test_logits_that_are_not_finite_end_their_request_alone(
    folder: Path, right: dict[str, list[int]]
) -> None:
    engine = make_engine(folder, poisoned_weights(folder))
    add(engine)
    engine.add("poisoned", (5, POISONED_TOKEN, 6), params())
    engine.add("poisoned and sampled", (POISONED_TOKEN,), params(temperature=1.0, num_logprobs=3))
    tokens, failures = run(engine, local_pool(folder, 2))
    assert tokens == right
    assert {failure.reason for failure in failures.values()} == {
        "the model computed logits that are not finite"
    }
    assert failures.keys() == {"poisoned", "poisoned and sampled"}


def test_a_prompt_that_is_poisoned_in_its_first_chunk_still_fails(folder: Path) -> None:
    engine = make_engine(folder, poisoned_weights(folder), max_batch_tokens=2)
    engine.add("poisoned", (POISONED_TOKEN, 1, 2, 3, 4, 5), params())
    tokens, failures = run(engine, local_pool(folder, 2))
    assert tokens == {}
    assert failures.keys() == {"poisoned"}


def test_a_row_that_cannot_be_sampled_ends_its_request_alone(
    folder: Path, right: dict[str, list[int]]
) -> None:
    engine = make_engine(folder)
    add(engine)
    broken = params(temperature=1.0)
    # No generator takes this seed; the bounds of the parameters would not let it through.
    object.__setattr__(broken, "seed", -1)
    engine.add("cannot", (3, 4), broken)
    tokens, failures = run(engine, local_pool(folder, 2))
    assert tokens == right
    assert failures.keys() == {"cannot"}
    assert "no token could be chosen" in failures["cannot"].reason


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("fails_at", [1, 2, 3, 4, 5, 6])
def test_a_step_that_fails_is_walked_to_its_end_and_ends_its_requests(
    folder: Path, right: dict[str, list[int]], lanes: int, fails_at: int
) -> None:
    engine = make_engine(folder, lanes=lanes)
    pool = FailingPool(local_pool(folder, 2), fails_at)
    add(engine)
    tokens, failures = run(engine, pool)
    assert failures.keys() == PROMPTS.keys()
    assert "the step that computed it failed" in failures["a"].reason
    add(engine)
    tokens, failures = run(engine, pool)
    assert tokens == right
    assert not failures
    # The experts saw every layer and lane of every step, with the rows that were announced.
    moe_layers = Checkpoint.open(folder).spec.moe_layers
    assert pool.dispatched == [
        (layer, lane, tokens)
        for announced in pool.announced
        for layer in moe_layers
        for lane, tokens in enumerate(announced)
    ]


def test_a_lost_peer_is_no_fault_of_the_step(folder: Path, right: dict[str, list[int]]) -> None:
    class LosingPool(FailingPool):
        def combine(self, handle: DispatchHandle) -> torch.Tensor:
            try:
                return super().combine(handle)
            except RuntimeError:
                raise PeerLostError("gone") from None

    engine = make_engine(folder)
    pool = LosingPool(local_pool(folder, 2), fails_at=2)
    add(engine)
    with pytest.raises(PeerLostError):
        engine.step(pool)
    assert len(pool.dispatched) == 2
    assert run(engine, pool) == (right, {})


def test_books_that_are_wrong_are_replaced(folder: Path, right: dict[str, list[int]]) -> None:
    engine = make_engine(folder)

    class PlanningPool(FailingPool):
        """Spoils the books: makes a plan while one is being run."""

        def begin_step(self, lane_tokens: Sequence[int]) -> None:
            engine.batcher.plan()
            super().begin_step(lane_tokens)

    add(engine)
    outcome = engine.step(PlanningPool(local_pool(folder, 2), fails_at=0))
    assert {failure.request_id for failure in outcome.failures} == PROMPTS.keys()
    add(engine)
    assert run(engine, local_pool(folder, 2)) == (right, {})


def test_requests_that_no_plan_takes_up_are_ended(folder: Path) -> None:
    engine = make_engine(folder)
    add(engine)
    for request_id in PROMPTS:
        engine.batcher.abort(request_id)
    outcome = engine.step(local_pool(folder, 2))
    assert {failure.request_id for failure in outcome.failures} == PROMPTS.keys()
    assert not engine.has_work


@pytest.mark.parametrize("broken_layer", [0, 2])
def test_the_other_attention_worker_goes_on(
    folder: Path, right: dict[str, list[int]], broken_layer: int
) -> None:
    spec = Checkpoint.open(folder).spec
    with group_configs(2, 2) as groups:
        experts = [
            in_thread(
                lambda group=group, runner=runner: serve_experts(  # type: ignore[misc]
                    group,
                    runner.partial,
                    layers=list(spec.moe_layers),
                    hidden_size=spec.hidden_size,
                )
            )
            for group, runner in zip(groups[2:], expert_runners(folder, 2), strict=True)
        ]

        def serve(rank: int, weights: AttentionWeights) -> object:
            pool = attention_side(groups[rank])
            engine = make_engine(folder, weights)
            results = []
            for _ in range(2):
                add(engine)
                results.append(run(engine, pool))
            pool.close()
            return results

        broken = in_thread(lambda: serve(0, broken_weights(folder, broken_layer)))
        sound = in_thread(lambda: serve(1, load_weights(folder)))
        assert sound.result(60) == [(right, {})] * 2
        for tokens, failures in broken.result(60):  # type: ignore[attr-defined]
            assert tokens == {}
            assert failures.keys() == PROMPTS.keys()
        for expert in experts:
            expert.result(60)


def test_experts_that_fail_end_the_requests_that_they_were_computing(
    folder: Path, right: dict[str, list[int]]
) -> None:
    first, second = (runner.partial for runner in expert_runners(folder, 2))
    unknown_layer = 99
    pool = LocalExpertPool(
        [first, lambda layer, x_TH: second(unknown_layer if layer == 1 else layer, x_TH)]
    )
    engine = make_engine(folder)
    add(engine)
    tokens, failures = run(engine, pool)
    assert tokens == {}
    assert failures.keys() == PROMPTS.keys()
    add(engine)
    assert run(engine, LocalExpertPool([first, second])) == (right, {})
