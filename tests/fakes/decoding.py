"""Greedy decoding with our own parts, stepping by hand so that the logits can be seen."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from janus_scheduler.activation import ActivationCosts, Scheduling
from janus_scheduler.batching import Batcher
from janus_scheduler.placement import round_robin
from janus_scheduler.request import SamplingParams
from janus_scheduler.request import Sequence as RequestSequence
from janus_server.attention.kv_cache import KvCache
from janus_server.attention.runner import AttentionRunner
from janus_server.attention.weights import load_attention_weights
from janus_server.comm.base import ExpertPool
from janus_server.comm.local import LocalExpertPool
from janus_server.experts.runner import ExpertRunner
from janus_server.experts.weights import load_layers
from janus_server.model.checkpoint import Checkpoint
from janus_server.model.weights import WeightReader

EXACT = Scheduling(policy="exact", costs=ActivationCosts(expert_ps=1, pair_ps=1))


@dataclass
class Decoded:
    """What was generated from a prompt."""

    token_ids: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


def expert_runners(
    folder: Path,
    num_workers: int,
    dtype: torch.dtype = torch.float32,
    slots: int | None = None,
    scheduling: Scheduling = EXACT,
) -> list[ExpertRunner]:
    """The expert workers of a round-robin placement."""
    checkpoint = Checkpoint.open(folder)
    placement = round_robin(
        moe_layers=checkpoint.spec.moe_layers,
        num_experts=checkpoint.spec.num_experts,
        num_workers=num_workers,
        slots_per_worker=slots,
    )
    with WeightReader(checkpoint, dtype=dtype, device=torch.device("cpu")) as reader:
        return [
            ExpertRunner(
                checkpoint.spec,
                load_layers(reader, placement, worker),
                worker=worker,
                scheduling=scheduling,
            )
            for worker in range(num_workers)
        ]


def local_pool(
    folder: Path,
    num_workers: int,
    dtype: torch.dtype = torch.float32,
    slots: int | None = None,
    scheduling: Scheduling = EXACT,
) -> ExpertPool:
    """All expert workers in this process."""
    runners = expert_runners(folder, num_workers, dtype, slots, scheduling)
    return LocalExpertPool([runner.partial for runner in runners])


def greedy_decode(
    folder: Path,
    pool: ExpertPool,
    prompts: Sequence[Sequence[int]],
    num_new: int,
    *,
    dtype: torch.dtype = torch.float32,
    max_batch_tokens: int = 256,
    num_blocks: int = 512,
    block_size: int = 8,
    lanes: int = 1,
) -> list[Decoded]:
    """Decode all prompts together, as an attention worker would."""
    checkpoint = Checkpoint.open(folder)
    with WeightReader(checkpoint, dtype=dtype, device=torch.device("cpu")) as reader:
        weights = load_attention_weights(reader)
    kv_cache = KvCache.allocate(
        checkpoint.spec,
        num_blocks=num_blocks,
        block_size=block_size,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    runner = AttentionRunner(
        checkpoint.spec, weights, kv_cache, max_context=checkpoint.spec.max_context
    )
    batcher = Batcher(
        max_batch_tokens=max_batch_tokens,
        max_sequences=len(prompts),
        block_size=block_size,
        num_blocks=num_blocks,
        max_lanes=lanes,
    )
    for index, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=num_new, temperature=0.0)
        batcher.add(RequestSequence(request_id=str(index), prompt_ids=tuple(prompt), params=params))
    decoded = [Decoded() for _ in prompts]
    while (plan := batcher.plan()) is not None:
        logits_BV = runner.forward(plan, pool)
        sampling = [sequence for sequence in plan.sequences if sequence.samples]
        sampled: dict[str, int] = {}
        for sequence, logits_V in zip(sampling, logits_BV, strict=True):
            sampled[sequence.request_id] = int(logits_V.argmax())
            prompt = decoded[int(sequence.request_id)]
            prompt.token_ids.append(sampled[sequence.request_id])
            prompt.logits.append(logits_V)
        batcher.complete(plan, sampled)
    batcher.check_integrity()
    return decoded
