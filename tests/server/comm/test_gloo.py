import random
import threading
import time

import pytest
import torch

from janus_server.comm.gloo import GlooExpertPool
from janus_server.comm.gloo_group import join_group
from janus_server.comm.step_words import ANNOUNCEMENT_WORDS
from janus_server.errors import PeerLostError
from janus_server.model.checkpoint import Checkpoint
from tests.conftest import CheckpointFactory
from tests.fakes.decoding import expert_runners, greedy_decode, local_pool
from tests.fakes.gloo_group import (
    attention_side,
    expert_side,
    group_configs,
    in_thread,
    serve_experts,
)

DEADLINE_S = 60
LAYERS = [0, 2]
HIDDEN = 3


def times(factor: float):  # type: ignore[no-untyped-def]
    """A share that can be computed by hand: x * factor * (layer + 1)."""
    return lambda layer, hidden_TH: hidden_TH * factor * (layer + 1)


@pytest.mark.parametrize("num_attention", [1, 2, 3])
@pytest.mark.parametrize("num_experts", [1, 2, 4])
def test_sums_of_all_shares_with_several_steps_and_lanes(
    num_attention: int, num_experts: int
) -> None:
    def attend(config) -> None:  # type: ignore[no-untyped-def]
        pool = attention_side(config)
        for step in range(5):
            lanes = [config.rank + 1 + step, 2][: 1 + (step + config.rank) % 2]
            pool.begin_step(lanes)
            hidden = [torch.full((tokens, HIDDEN), float(tokens)) for tokens in lanes]
            for layer in LAYERS:
                handles = [pool.dispatch(layer, i, x_TH) for i, x_TH in enumerate(hidden)]
                for x_TH, handle in zip(hidden, handles, strict=True):
                    total = sum(range(1, num_experts + 1)) * (layer + 1)
                    assert torch.equal(pool.combine(handle), x_TH * total)
            if step % 2:
                pool.idle()
        pool.close()

    with group_configs(num_attention, num_experts) as configs:
        work = [
            in_thread(
                lambda c=config: serve_experts(
                    c, times(c.rank - num_attention + 1), layers=LAYERS, hidden_size=HIDDEN
                )
            )
            for config in configs[num_attention:]
        ]
        work += [in_thread(lambda c=config: attend(c)) for config in configs[:num_attention]]
        for future in work:
            future.result(DEADLINE_S)


def test_a_step_without_moe_layers(make_checkpoint: CheckpointFactory) -> None:
    with group_configs(1, 1) as configs:
        experts = in_thread(
            lambda: serve_experts(configs[1], times(1), layers=[], hidden_size=HIDDEN)
        )
        pool = attention_side(configs[0])
        for _ in range(3):
            pool.begin_step([4])
        pool.close()
        experts.result(DEADLINE_S)


@pytest.mark.parametrize(
    ("num_attention", "num_experts"), [(1, 1), (1, 2), (2, 1), (2, 3), (3, 2), (1, 4), (3, 4)]
)
@pytest.mark.parametrize("lanes", [1, 2])
def test_tokens_equal_those_of_the_local_transport(
    make_checkpoint: CheckpointFactory, num_attention: int, num_experts: int, lanes: int
) -> None:
    folder = make_checkpoint(num_experts=7, decoder_sparse_step=2, num_hidden_layers=4)
    spec = Checkpoint.open(folder).spec
    rng = random.Random(2)
    batches = [
        [[rng.randrange(256) for _ in range(rng.randrange(1, 50))] for _ in range(3 + rank)]
        for rank in range(num_attention)
    ]
    runners = expert_runners(folder, num_experts)

    def attend(rank: int) -> list[list[int]]:
        pool = attention_side(configs[rank])
        decoded = greedy_decode(
            folder, pool, batches[rank], 4 + rank, lanes=lanes, max_batch_tokens=64
        )
        pool.close()
        return [prompt.token_ids for prompt in decoded]

    with group_configs(num_attention, num_experts) as configs:
        experts = [
            in_thread(
                lambda c=config, r=runner: serve_experts(
                    c, r.partial, layers=list(spec.moe_layers), hidden_size=spec.hidden_size
                )
            )
            for config, runner in zip(configs[num_attention:], runners, strict=True)
        ]
        attention = [in_thread(lambda r=rank: attend(r)) for rank in range(num_attention)]
        results = [future.result(DEADLINE_S) for future in attention]
        for future in experts:
            future.result(DEADLINE_S)
    for rank, batch in enumerate(batches):
        expected = greedy_decode(folder, local_pool(folder, num_experts), batch, 4 + rank)
        assert results[rank] == [prompt.token_ids for prompt in expected]
    # Every expert worker has seen every token, and counts alike.
    assert all(runner.counts() == runners[0].counts() for runner in runners)


def test_bf16_travels_as_bf16() -> None:
    with group_configs(1, 1) as configs:
        experts = in_thread(
            lambda: serve_experts(
                configs[1], times(1), layers=[0], hidden_size=HIDDEN, dtype=torch.bfloat16
            )
        )
        pool = attention_side(configs[0])
        x_TH = torch.randn(4, HIDDEN).bfloat16()
        pool.begin_step([4])
        handle = pool.dispatch(0, 0, x_TH)
        assert handle.partials_WTH.dtype == torch.bfloat16
        combined = pool.combine(handle)
        assert combined.dtype == torch.float32
        assert torch.equal(combined, x_TH.float())
        pool.close()
        experts.result(DEADLINE_S)


def test_a_silent_attention_worker_is_named() -> None:
    with group_configs(1, 1, timeout_s=1.0) as configs:
        experts = in_thread(
            lambda: serve_experts(configs[1], times(1), layers=[0], hidden_size=HIDDEN)
        )
        attention_side(configs[0])
        with pytest.raises(PeerLostError, match="attention worker"):
            experts.result(DEADLINE_S)


@pytest.mark.parametrize("words", [[9, 0], [0, -1], [0, 1, 2**62], [0, 1, 4097], [0, 5]])
def test_an_attention_worker_that_speaks_nonsense_is_named(words: list[int]) -> None:
    with group_configs(1, 2, timeout_s=DEADLINE_S) as configs:
        experts = [
            in_thread(lambda c=config: serve_experts(c, times(1), layers=[0], hidden_size=HIDDEN))
            for config in configs[1:]
        ]
        group = join_group(configs[0])
        said = torch.tensor([*words, *[0] * (ANNOUNCEMENT_WORDS - len(words))])
        group.send([said], configs[0].expert_ranks[0], 0).wait()
        with pytest.raises(PeerLostError, match="attention worker 0 was given up: it announced"):
            experts[0].result(DEADLINE_S)
        with pytest.raises(PeerLostError):
            experts[1].result(DEADLINE_S)


def test_a_layout_that_makes_no_sense_is_refused() -> None:
    with group_configs(1, 2, timeout_s=DEADLINE_S) as configs:
        follower = in_thread(
            lambda: serve_experts(configs[2], times(1), layers=[0], hidden_size=HIDDEN)
        )
        attention = in_thread(lambda: attention_side(configs[0]))
        group = join_group(configs[1])
        attention.result(DEADLINE_S)
        group.send([torch.tensor([0, 1, 2**40, 0, 0, 0])], configs[2].rank, 0).wait()
        with pytest.raises(PeerLostError, match="the first expert worker was given up: it said"):
            follower.result(DEADLINE_S)


def test_a_step_that_is_answered_with_nonsense_is_given_up() -> None:
    with group_configs(1, 1, timeout_s=DEADLINE_S) as configs:
        joining = in_thread(lambda: attention_side(configs[0]))
        group, pool = join_group(configs[1]), joining.result(DEADLINE_S)
        stepping = in_thread(lambda: run_step(pool, [0], 1))
        group.recv([torch.zeros(ANNOUNCEMENT_WORDS, dtype=torch.int64)], 0, 0).wait()
        group.send([torch.tensor([7])], 0, 0).wait()
        with pytest.raises(PeerLostError, match="given up: it answered a step with 7"):
            stepping.result(DEADLINE_S)


def slow_steps(started: threading.Event):  # type: ignore[no-untyped-def]
    """A share that takes its time for a single token, and none for several."""

    def ffn(layer: int, hidden_TH: torch.Tensor) -> torch.Tensor:
        started.set()
        time.sleep(0.2 if len(hidden_TH) == 1 else 0)
        return hidden_TH

    return ffn


def run_step(pool: GlooExpertPool, layers: list[int], tokens: int) -> None:
    pool.begin_step([tokens])
    for layer in layers:
        pool.combine(pool.dispatch(layer, 0, torch.ones(tokens, HIDDEN)))


def test_a_step_may_take_longer_than_the_deadline() -> None:
    def work() -> None:
        pool = attention_side(configs[0])
        run_step(pool, layers, 1)
        pool.close()

    def join_later() -> None:
        pool = attention_side(configs[1])
        pool.idle()
        started.wait(DEADLINE_S)
        run_step(pool, layers, 2)  # which starts when the long step is over
        pool.close()

    def stay_idle() -> None:
        pool = attention_side(configs[2])
        while not all(future.done() for future in workers):
            pool.idle()
            time.sleep(0.1)
        pool.close()

    started = threading.Event()
    layers = list(range(16))
    with group_configs(3, 2, timeout_s=1.5) as configs:
        experts = [
            in_thread(
                lambda c=config: serve_experts(
                    c, slow_steps(started), layers=layers, hidden_size=HIDDEN
                )
            )
            for config in configs[3:]
        ]
        workers = [in_thread(work), in_thread(join_later)]
        for future in [in_thread(stay_idle), *workers, *experts]:
            future.result(DEADLINE_S)


def test_an_idle_worker_that_falls_silent_within_a_step_is_named() -> None:
    def work() -> None:
        run_step(attention_side(configs[0]), layers, 1)

    started = threading.Event()
    layers = list(range(100))
    with group_configs(2, 1, timeout_s=1.0) as configs:
        experts = in_thread(
            lambda: serve_experts(
                configs[2], slow_steps(started), layers=layers, hidden_size=HIDDEN
            )
        )
        busy = in_thread(work)
        silent = attention_side(configs[1])
        silent.idle()
        with pytest.raises(PeerLostError, match="listening to attention worker 1: Timed out"):
            experts.result(DEADLINE_S)
        with pytest.raises(PeerLostError):
            busy.result(DEADLINE_S)


def test_all_that_wait_end_at_once_when_the_leader_gives_up() -> None:
    with group_configs(1, 2) as configs:
        pools = [in_thread(lambda c=c: expert_side(c, hidden_size=HIDDEN)) for c in configs[1:]]
        attention = attention_side(configs[0])
        leader, follower = (pool.result(DEADLINE_S) for pool in pools)
        work = [in_thread(lambda p=p: p.serve(times(1), [0])) for p in (leader, follower)]
        run_step(attention, [0], 1)
        work.append(in_thread(lambda: run_step(attention, [1], 1)))
        leader.abandon()
        for future in work:
            with pytest.raises(PeerLostError):
                future.result(DEADLINE_S)


@pytest.mark.parametrize("side", ["attention", "expert"])
def test_a_worker_that_gives_up_frees_its_own_thread(side: str) -> None:
    with group_configs(1, 1) as configs:
        joining = in_thread(lambda: expert_side(configs[1], hidden_size=HIDDEN))
        attention, experts = attention_side(configs[0]), joining.result(DEADLINE_S)
        if side == "attention":  # its step never starts: nobody serves
            waiting = in_thread(lambda: run_step(attention, [0], 1))
            attention.abandon()
        else:
            waiting = in_thread(lambda: experts.serve(times(1), [0]))
            experts.abandon()
        with pytest.raises(PeerLostError):
            waiting.result(DEADLINE_S)


def test_an_expert_worker_that_fails_is_noticed() -> None:
    def fail(layer: int, hidden_TH: torch.Tensor) -> torch.Tensor:
        stop.wait(DEADLINE_S)
        raise PeerLostError("injected")

    stop = threading.Event()
    with group_configs(1, 1, timeout_s=2.0) as configs:
        experts = in_thread(lambda: serve_experts(configs[1], fail, layers=[0], hidden_size=HIDDEN))
        pool = attention_side(configs[0])
        pool.begin_step([1])
        handle = pool.dispatch(0, 0, torch.zeros(1, HIDDEN))
        with pytest.raises(PeerLostError, match="experts of layer 0"):
            pool.combine(handle)
        stop.set()
        with pytest.raises(PeerLostError):
            experts.result(DEADLINE_S)


def test_workers_that_do_not_come_are_not_awaited_for_ever() -> None:
    with (
        group_configs(1, 1, timeout_s=1.0) as configs,
        pytest.raises(PeerLostError, match="while the group group-"),
    ):
        join_group(configs[0])
