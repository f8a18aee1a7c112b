import random
from pathlib import Path

import pytest

from janus_scheduler.request import FinishReason, SamplingParams
from janus_server.attention.engine import Engine
from janus_server.errors import ConfigError
from tests.conftest import CheckpointFactory
from tests.fakes.decoding import local_pool
from tests.fakes.engines import make_engine

PROMPT = (5, 99, 200, 14)


@pytest.fixture(scope="module")
def folder(make_checkpoint: CheckpointFactory) -> Path:
    return make_checkpoint()


def run(folder: Path, engine: Engine) -> dict[str, list[int]]:
    pool = local_pool(folder, 2)
    tokens: dict[str, list[int]] = {}
    while engine.has_work:
        for output in engine.step(pool).outputs:
            tokens.setdefault(output.request_id, []).append(output.token_id)
    engine.batcher.check_integrity()
    return tokens


def params(**changes: object) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 8, "temperature": 0.0, **changes})


def test_stops_at_a_stop_token_and_at_max_tokens(folder: Path) -> None:
    engine = make_engine(folder)
    engine.add("free", PROMPT, params())
    free = run(folder, engine)["free"]
    stop = free[3]
    engine.add("stopped", PROMPT, params(stop_token_ids=frozenset({stop})))
    pool = local_pool(folder, 2)
    outputs = []
    while engine.has_work:
        outputs += engine.step(pool).outputs
    assert [output.token_id for output in outputs] == free[: free.index(stop) + 1]
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert len(free) == 8


def test_a_seeded_request_is_the_same_alone_in_a_batch_and_after_preemption(folder: Path) -> None:
    sampling = params(temperature=1.5, top_k=50, top_p=0.95, min_p=0.01, seed=7, max_tokens=20)
    engine = make_engine(folder)
    engine.add("one", PROMPT, sampling)
    alone = run(folder, engine)["one"]
    assert len(set(alone)) > 3
    rng = random.Random(0)
    others = [tuple(rng.randrange(256) for _ in range(rng.randrange(1, 30))) for _ in range(9)]
    # 3 layers of keys and values, 2 heads of 16 floats: 768 bytes a token. Room for 80 tokens.
    tight = make_engine(folder, kv_cache_gib=80 * 768 / 2**30, block_size=4)
    for index, prompt in enumerate(others):
        tight.add(f"other {index}", prompt, params(max_tokens=15, temperature=1.0, seed=index))
    tight.add("one", PROMPT, sampling)
    assert run(folder, tight)["one"] == alone
    assert tight.batcher.num_preemptions > 0


def test_different_seeds_differ(folder: Path) -> None:
    engine = make_engine(folder)
    for seed in range(3):
        engine.add(str(seed), PROMPT, params(temperature=2.0, seed=seed))
    assert len({tuple(tokens) for tokens in run(folder, engine).values()}) == 3


def test_logprobs_only_where_asked(folder: Path) -> None:
    engine = make_engine(folder)
    engine.add("with", PROMPT, params(num_logprobs=2, max_tokens=1))
    engine.add("without", PROMPT, params(max_tokens=1))
    outputs = {output.request_id: output for output in engine.step(local_pool(folder, 2)).outputs}
    logprobs = outputs["with"].logprobs
    assert logprobs is not None
    assert logprobs.top_ids[0] == outputs["with"].token_id
    assert logprobs.chosen == logprobs.top[0] > logprobs.top[1]
    assert outputs["without"].logprobs is None


def test_abort_frees_the_blocks_at_once(folder: Path) -> None:
    engine = make_engine(folder)
    engine.add("one", PROMPT, params())
    engine.step(local_pool(folder, 2))
    assert engine.batcher.num_free_blocks < engine.num_blocks
    assert engine.abort("one")
    assert engine.batcher.num_free_blocks == engine.num_blocks
    assert not engine.abort("one")
    assert not engine.has_work


def test_refuses_what_can_never_run(folder: Path) -> None:
    engine = make_engine(folder)
    with pytest.raises(ValueError, match="too many"):
        engine.add("long", PROMPT, params(max_tokens=1021))
    engine.add("twice", PROMPT, params())
    with pytest.raises(ValueError, match="in use"):
        engine.add("twice", PROMPT, params())
    with pytest.raises(ValueError, match="no prompt"):
        engine.add("empty", (), params())


@pytest.mark.parametrize(
    ("config", "max_context"),
    [
        ({"max_context": 64}, 64),
        # 768 bytes a token; the last token of a request is never fed, and needs no slot.
        ({"kv_cache_gib": 80 * 768 / 2**30, "block_size": 16}, 81),
    ],
)
def test_takes_what_its_context_and_its_kv_blocks_hold(
    folder: Path, config: dict[str, float], max_context: int
) -> None:
    engine = make_engine(folder, **config)
    assert engine.max_context == max_context
    with pytest.raises(ValueError, match="too many"):
        engine.add("long", PROMPT, params(max_tokens=max_context - len(PROMPT) + 1))
    engine.add("longest", PROMPT, params(max_tokens=max_context - len(PROMPT)))
    assert len(run(folder, engine)["longest"]) == max_context - len(PROMPT)


def test_refuses_impossible_configurations(folder: Path) -> None:
    with pytest.raises(ConfigError, match="too small for any request"):
        make_engine(folder, kv_cache_gib=1e-9)
    with pytest.raises(ConfigError, match="from 2 to the model's 1024"):
        make_engine(folder, max_context=4096)
