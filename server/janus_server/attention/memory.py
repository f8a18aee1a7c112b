"""What an attention worker needs of memory, and how much of it becomes KV cache. Torch-free."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from janus_scheduler.model_spec import ModelSpec
from janus_server.attention.config import EngineConfig
from janus_server.errors import ConfigError
from janus_server.model.checkpoint import Checkpoint
from janus_server.model.config import ModelConfig, context_limit
from janus_server.model.memory import FP32_BYTES, PROCESS_BYTES, MemoryNeeds

_KV_SHARE: Mapping[str, float] = {"cpu": 0.5, "cuda": 0.9}
"""How much of the memory that nothing else needs becomes KV cache. A CPU's memory is there for
other programs too, and the system commits the cache as it is written: too late to refuse."""


def kv_block_bytes(spec: ModelSpec, config: EngineConfig, value_bytes: int) -> int:
    """Bytes of one KV block."""
    return spec.kv_values_per_token * value_bytes * config.block_size


def most_blocks(spec: ModelSpec, config: EngineConfig) -> int:
    """KV blocks that as many sequences as may run fill; more would never be used."""
    context = context_limit(spec, config.max_context)
    return config.max_sequences * -(-context // config.block_size)


def num_kv_blocks(spec: ModelSpec, config: EngineConfig, value_bytes: int) -> int:
    """KV blocks in the memory that `config` names; raises ConfigError where no request fits."""
    block = kv_block_bytes(spec, config, value_bytes)
    fit = int(config.kv_cache_gib * 2**30) // block
    if fit < _fewest_blocks(config):
        least = _fewest_blocks(config) * block / 2**30
        raise ConfigError(
            f"--kv-cache-gib {config.kv_cache_gib:g} is too small for any request, which takes "
            f"{least:.3g} at least"
        )
    return min(fit, most_blocks(spec, config))


def _fewest_blocks(config: EngineConfig) -> int:
    """KV blocks of the shortest request: one token of the prompt and one more."""
    return 2 if config.block_size == 1 else 1


def free_kv_bytes(
    spec: ModelSpec,
    config: EngineConfig,
    model: ModelConfig,
    *,
    free: int,
    needs: Sequence[MemoryNeeds],
    num_sharing: int,
) -> int:
    """KV cache for each of `num_sharing` attention workers on a device with `free` bytes.

    `needs` are those of all processes there, without a KV cache. Room for the shortest
    request at least, though it may not fit.
    """
    block = kv_block_bytes(spec, config, model.value_bytes)
    left = max(free - sum(process.total for process in needs), 0)
    share = int(_KV_SHARE[model.device] * left) // num_sharing
    return min(max(share // block, _fewest_blocks(config)), most_blocks(spec, config)) * block


def with_kv_bytes(config: EngineConfig, kv_bytes: int) -> EngineConfig:
    """The same with this size of the KV cache."""
    return dataclasses.replace(config, kv_cache_gib=kv_bytes / 2**30)


def attention_needs(
    checkpoint: Checkpoint, config: EngineConfig, model: ModelConfig, *, num_expert_workers: int = 1
) -> MemoryNeeds:
    """What an attention worker needs, with the KV cache that `config` names; 0: without.

    Raises ConfigError where that holds no request.
    """
    spec, value_bytes = checkpoint.spec, model.value_bytes
    if config.kv_cache_gib:
        num_kv_blocks(spec, config, value_bytes)
    shapes = checkpoint.family.tensor_shapes(spec)
    gates = len(spec.moe_layers) * spec.num_experts * spec.hidden_size
    experts = len(spec.moe_layers) * spec.num_experts * spec.expert_values
    embedding = spec.vocab_size * spec.hidden_size
    context = context_limit(spec, config.max_context)
    values = sum(map(math.prod, shapes.values())) - gates - experts
    # A tied LM head is packed beside the embedding; the rotary tables have a row a position.
    values += spec.tied_embeddings * embedding + 2 * context * spec.head_dim
    return MemoryNeeds(
        name="attention worker",
        weights=values * value_bytes,
        kv_cache=int(config.kv_cache_gib * 2**30),
        working_buffers=max(
            _step_bytes(spec, config, value_bytes, context, num_expert_workers),
            # The LM head as read, converted and packed.
            2 * embedding * value_bytes,
        ),
        process=PROCESS_BYTES[model.device],
    )


def _step_bytes(
    spec: ModelSpec, config: EngineConfig, value_bytes: int, context: int, num_expert_workers: int
) -> int:
    tokens, hidden = config.max_batch_tokens, spec.hidden_size
    row = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    # The stream and its norm, partial results of the experts and their sum, in fp32 where added.
    stream = hidden * ((4 + num_expert_workers) * value_bytes + 4 * FP32_BYTES)
    # Projections, normed in fp32, and rotated; or what a dense layer has in between.
    attention = row * (4 * value_bytes + 2 * FP32_BYTES)
    dense = 4 * spec.dense_intermediate_size * value_bytes
    # A chunk of a long prompt has a mask over its context; scattered KV blocks are copied.
    mask = min(tokens, context) * context * (1 + value_bytes)
    copies = 2 * context * spec.num_kv_heads * spec.head_dim * value_bytes
    # Logits as computed, in fp32, and as log-probabilities; what sampling takes for one row.
    rows = min(config.max_sequences, tokens) * (value_bytes + 3 * FP32_BYTES) + 8 * FP32_BYTES
    return tokens * (stream + max(attention, dense)) + mask + copies + rows * spec.vocab_size
