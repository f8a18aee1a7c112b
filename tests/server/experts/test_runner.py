"""Expert workers against the MoE block of transformers: partial sums, and what they count."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from janus_scheduler.placement import round_robin
from janus_server.experts.worker import expert_load
from janus_server.model.checkpoint import Checkpoint
from tests.conftest import CheckpointFactory
from tests.fakes.checkpoints import reference_model
from tests.fakes.decoding import expert_runners

NUM_EXPERTS = 8


def reference_blocks(folder: Path) -> dict[int, Qwen3MoeSparseMoeBlock]:
    """The MoE blocks of a checkpoint, by layer."""
    layers = enumerate(reference_model(folder).model.layers)
    return {
        index: layer.mlp for index, layer in layers if isinstance(layer.mlp, Qwen3MoeSparseMoeBlock)
    }


def batches_of(*num_tokens: int, hidden_size: int = 64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(num, hidden_size, generator=generator) for num in num_tokens]


@torch.inference_mode()
@pytest.mark.parametrize(
    ("num_workers", "slots"), [(1, None), (2, None), (3, None), (2, 5), (3, NUM_EXPERTS)]
)
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_partial_sums_of_all_workers_add_up(
    make_checkpoint: CheckpointFactory, num_workers: int, slots: int | None, norm_topk_prob: bool
) -> None:
    folder = make_checkpoint(
        num_experts=NUM_EXPERTS,
        decoder_sparse_step=2,
        num_hidden_layers=4,
        norm_topk_prob=norm_topk_prob,
    )
    blocks = reference_blocks(folder)
    assert list(blocks) == [1, 3]
    runners = expert_runners(folder, num_workers, slots=slots)
    for layer, block in blocks.items():
        for hidden_TH in batches_of(1, 2, 33):
            expected_TH = block(hidden_TH[None])[0]
            partials = [runner.partial(layer, hidden_TH) for runner in runners]
            torch.testing.assert_close(sum(partials), expected_TH, rtol=1e-5, atol=1e-5)
            if num_workers > 1 and len(hidden_TH) == 33:
                assert not any(torch.equal(partial, expected_TH) for partial in partials)


@torch.inference_mode()
def test_counts_are_those_of_the_routing(make_checkpoint: CheckpointFactory) -> None:
    folder = make_checkpoint(num_experts=NUM_EXPERTS, decoder_sparse_step=2, num_hidden_layers=4)
    # Two workers of 4 slots for 8 experts: no replicas, so routing alone decides who computes.
    runners = expert_runners(folder, 2)
    placement = round_robin(
        moe_layers=Checkpoint.open(folder).spec.moe_layers, num_experts=NUM_EXPERTS, num_workers=2
    )
    for layer, block in reference_blocks(folder).items():
        tokens_E, tokens_W, experts_W = np.zeros(NUM_EXPERTS, int), [0, 0], [0, 0]
        sum_a_max = 0
        held = [set(placement.worker_slots(layer, worker).tolist()) for worker in range(2)]
        # Enough batches that now this worker reads most, now the other.
        for hidden_TH in batches_of(*[1] * 8, 6):
            ids = block.gate(hidden_TH)[2].flatten().tolist()
            tokens_E += np.bincount(ids, minlength=NUM_EXPERTS)
            for worker in range(2):
                tokens_W[worker] += sum(expert in held[worker] for expert in ids)
                experts_W[worker] += len(held[worker] & set(ids))
            sum_a_max += max(len(held[worker] & set(ids)) for worker in range(2))
            for runner in runners:
                runner.partial(layer, hidden_TH)
        for runner in runners:
            counts = runner.counts()[layer]
            assert counts.num_steps == 9
            assert counts.tokens_E == tokens_E.tolist()
            assert counts.tokens_W == tokens_W
            assert counts.experts_W == experts_W
            assert counts.sum_a_max == sum_a_max


@torch.inference_mode()
@pytest.mark.parametrize("slots", [5, NUM_EXPERTS])
def test_replicas_move_work_but_count_the_same_tokens(
    make_checkpoint: CheckpointFactory, slots: int
) -> None:
    folder = make_checkpoint(num_experts=NUM_EXPERTS, decoder_sparse_step=2, num_hidden_layers=4)
    alone, replicated = expert_runners(folder, 2), expert_runners(folder, 2, slots=slots)
    (hidden_TH,) = batches_of(5)
    for runner in (*alone, *replicated):
        runner.partial(1, hidden_TH)
    before, after = alone[0].counts()[1], replicated[0].counts()[1]
    assert after.tokens_E == before.tokens_E
    assert sum(after.experts_W) == sum(before.experts_W)  # no expert is read twice
    assert after.sum_a_max <= before.sum_a_max
    if slots == NUM_EXPERTS:  # every expert is everywhere
        assert after.sum_a_max == -(-sum(after.experts_W) // 2)


@torch.inference_mode()
def test_a_heartbeat_tells_a_workers_own_share_and_what_all_see(
    make_checkpoint: CheckpointFactory,
) -> None:
    folder = make_checkpoint(num_experts=NUM_EXPERTS, decoder_sparse_step=2, num_hidden_layers=4)
    runners = expert_runners(folder, 2, slots=5)
    for hidden_TH in batches_of(1, 6):
        for runner in runners:
            runner.partial(1, hidden_TH)
            runner.partial(3, hidden_TH)
    loads = [expert_load(runner) for runner in runners]
    counts = runners[0].counts()
    for worker, load in enumerate(loads):
        assert load.num_layer_steps == 4
        assert load.num_token_pairs == sum(
            of_layer.tokens_W[worker] for of_layer in counts.values()
        )
        assert load.num_activated_experts == sum(
            of_layer.experts_W[worker] for of_layer in counts.values()
        )
        assert [reported.layer for reported in load.layers] == [1, 3]
        for reported in load.layers:
            of_layer = counts[reported.layer]
            assert list(reported.expert_tokens) == of_layer.tokens_E
            assert reported.num_steps == of_layer.num_steps == 2
            assert reported.sum_a_max == of_layer.sum_a_max
            assert reported.num_activated_experts == sum(of_layer.experts_W)
