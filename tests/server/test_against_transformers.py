"""Our tokens and logits against those of transformers on the same checkpoint."""

import random
from pathlib import Path

import pytest
import torch

from janus_scheduler.activation import POLICIES, ActivationCosts, SchedulePolicy, Scheduling
from janus_server.model.checkpoint import Checkpoint
from tests.conftest import CheckpointFactory
from tests.fakes.checkpoints import reference_decode, reference_model
from tests.fakes.decoding import greedy_decode, local_pool

NUM_NEW = 6
SHAPES = {
    "plain": {},
    "one_kv_head": {"num_key_value_heads": 1},
    "no_query_groups": {"num_key_value_heads": 4},
    "tied_embeddings": {"tie_word_embeddings": True},
    "weights_not_normalised": {"norm_topk_prob": False},
    "every_second_layer_dense": {"decoder_sparse_step": 2, "num_hidden_layers": 4},
    "first_layer_dense": {"mlp_only_layers": [0]},
    "attention_bias": {"attention_bias": True},
    "seven_experts_one_each": {"num_experts": 7, "num_experts_per_tok": 1},
    "all_experts_chosen": {"num_experts": 4, "num_experts_per_tok": 4},
    "odd_sizes": {"hidden_size": 40, "head_dim": 24, "moe_intermediate_size": 20},
    "high_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
}


def prompts_of(*lengths: int, vocab_size: int = 256) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(vocab_size) for _ in range(length)] for length in lengths]


def assert_same(
    folder: Path,
    prompts: list[list[int]],
    num_new: int = NUM_NEW,
    *,
    num_experts: int = 2,
    **options: int,
) -> None:
    model = reference_model(folder)
    decoded = greedy_decode(folder, local_pool(folder, num_experts), prompts, num_new, **options)
    for prompt, ours in zip(prompts, decoded, strict=True):
        token_ids, logits = reference_decode(model, prompt, num_new)
        assert ours.token_ids == token_ids, f"prompt of {len(prompt)} tokens"
        difference = (torch.stack(ours.logits) - logits).abs().max() / logits.abs().max()
        assert difference < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_in_a_mixed_batch(make_checkpoint: CheckpointFactory, shape: str) -> None:
    assert_same(make_checkpoint(**SHAPES[shape]), prompts_of(1, 5, 33, 2, 90))


@pytest.mark.parametrize("policy", POLICIES)
def test_the_choice_of_replicas_never_changes_a_token(
    make_checkpoint: CheckpointFactory, policy: SchedulePolicy
) -> None:
    folder = make_checkpoint()
    num_experts = Checkpoint.open(folder).spec.num_experts
    scheduling = Scheduling(policy=policy, costs=ActivationCosts(expert_ps=40, pair_ps=10))
    model = reference_model(folder)
    for num_workers in (2, 3):
        # Half as many slots again as experts, and all experts on each worker.
        for slots in (-(-3 * num_experts // (2 * num_workers)), num_experts):
            pool = local_pool(folder, num_workers, slots=slots, scheduling=scheduling)
            prompts = prompts_of(3, 40, 1)
            decoded = greedy_decode(folder, pool, prompts, NUM_NEW)
            for prompt, ours in zip(prompts, decoded, strict=True):
                assert ours.token_ids == reference_decode(model, prompt, NUM_NEW)[0]


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 63, 64, 65, 255, 256, 257, 600])
def test_prompt_lengths(make_checkpoint: CheckpointFactory, length: int) -> None:
    assert_same(make_checkpoint(), prompts_of(length))


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 8, 16, 31, 64, 100, 1000])
def test_chunk_sizes(make_checkpoint: CheckpointFactory, chunk: int) -> None:
    assert_same(make_checkpoint(), prompts_of(70, 3, 41), max_batch_tokens=chunk)


@pytest.mark.parametrize("num_experts", [1, 2, 3, 4, 6])
def test_numbers_of_expert_workers(make_checkpoint: CheckpointFactory, num_experts: int) -> None:
    assert_same(make_checkpoint(), prompts_of(9, 40), num_experts=num_experts)


@pytest.mark.parametrize("lanes", [2, 3, 4])
def test_lanes(make_checkpoint: CheckpointFactory, lanes: int) -> None:
    assert_same(make_checkpoint(), prompts_of(9, 40, 3, 17, 1), lanes=lanes)


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_block_sizes(make_checkpoint: CheckpointFactory, block_size: int) -> None:
    assert_same(make_checkpoint(), prompts_of(33, 5), block_size=block_size)


def test_preemption_changes_no_token(make_checkpoint: CheckpointFactory) -> None:
    # Room for about two of the four sequences at their full length.
    assert_same(make_checkpoint(), prompts_of(30, 30, 30, 30), 20, num_blocks=14)


def test_a_batch_changes_no_request(make_checkpoint: CheckpointFactory) -> None:
    folder = make_checkpoint()
    rng = random.Random(1)
    prompts = prompts_of(*(rng.randrange(1, 60) for _ in range(32)))
    together = greedy_decode(folder, local_pool(folder, 2), prompts, 12)
    for prompt, batched in list(zip(prompts, together, strict=True))[::5]:
        (alone,) = greedy_decode(folder, local_pool(folder, 2), [prompt], 12)
        assert alone.token_ids == batched.token_ids


def test_bf16_stays_near_transformers_in_fp32(make_checkpoint: CheckpointFactory) -> None:
    """bf16 keeps 8 bits: one rounding is off by up to 2**-9, and dozens follow each other.

    So neither implementation is held to the other's rounding: ours may be at most as far from the
    fp32 truth as 1.5 times what transformers itself is in bf16, on average over the logits.
    """
    folder = make_checkpoint(initializer_range=0.05)
    (prompt,) = prompts_of(50)
    _, truth = reference_decode(reference_model(folder), prompt, 1)
    _, theirs = reference_decode(reference_model(folder, torch.bfloat16), prompt, 1)
    pool = local_pool(folder, 2, torch.bfloat16)
    (ours,) = greedy_decode(folder, pool, [prompt], 1, dtype=torch.bfloat16)
    off = (ours.logits[0] - truth[0]).abs().mean() / truth.abs().max()
    assert off < 1.5 * (theirs - truth).abs().mean() / truth.abs().max()
