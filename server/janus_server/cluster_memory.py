"""Whether the processes of a ServeConfig fit this machine, and what their KV caches get of it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from janus_server.attention.memory import attention_needs, free_kv_bytes, with_kv_bytes
from janus_server.config import ServeConfig
from janus_server.controller.placement import first_placement
from janus_server.experts.memory import expert_needs
from janus_server.model.checkpoint import Checkpoint
from janus_server.model.memory import (
    ADDRESS_SPACE,
    PROCESS_BYTES,
    UNLIMITED,
    MemoryNeeds,
    check_fits,
)
from janus_server.monolith.memory import monolith_needs


@dataclass(frozen=True, kw_only=True, slots=True)
class _Memory:
    """One memory: this machine's, a GPU's, or what the addresses of one process allow."""

    where: str
    free: int
    """Bytes."""
    needs: Sequence[MemoryNeeds]
    """Of the processes that share it."""
    num_attention: int
    """Attention workers among them."""


def fit_memory(
    config: ServeConfig,
    *,
    free: int,
    address_space: int = UNLIMITED,
    gpus_free: Sequence[int] = (),
) -> ServeConfig:
    """The same with a size for the KV cache of each attention worker, where it names none.

    `free` are the bytes that this machine has to give, `address_space` those that each process can
    take at most, `gpus_free` those of its GPUs, which the workers take in turn. Raises ConfigError
    where the processes do not fit.
    """
    checkpoint = Checkpoint.open(config.model.checkpoint)

    def memories(config: ServeConfig) -> list[_Memory]:
        return _memories(config, checkpoint, free, address_space, gpus_free)

    if not config.engine.kv_cache_gib:
        sizes = [
            free_kv_bytes(
                checkpoint.spec,
                config.engine,
                config.model,
                free=memory.free,
                needs=memory.needs,
                num_sharing=memory.num_attention,
            )
            for memory in memories(config)
            if memory.num_attention
        ]
        # Equal for all, as the endpoint treats them alike.
        engine = with_kv_bytes(config.engine, min(sizes, default=0))
        config = dataclasses.replace(config, engine=engine)
    for memory in memories(config):
        check_fits(memory.needs, free=memory.free, where=memory.where)
    return config


def _memories(
    config: ServeConfig,
    checkpoint: Checkpoint,
    free: int,
    address_space: int,
    gpus_free: Sequence[int],
) -> list[_Memory]:
    workers = _worker_needs(config, checkpoint)
    num_attention, num_gpus = config.pools.attention_workers, len(gpus_free)
    # They compute nothing.
    half = PROCESS_BYTES["cpu"] // 2
    others = [MemoryNeeds(name=name, process=half) for name in ("controller", "endpoint")]
    if not num_gpus:
        return [
            _Memory(
                where="this machine",
                free=free,
                needs=[*workers, *others],
                num_attention=num_attention,
            ),
            *(
                _Memory(
                    where=ADDRESS_SPACE,
                    free=address_space,
                    needs=[worker],
                    num_attention=int(index < num_attention),
                )
                for index, worker in enumerate(workers)
            ),
        ]
    beside = [MemoryNeeds(name=worker.name, process=PROCESS_BYTES["cuda"]) for worker in workers]
    return [
        _Memory(where="this machine", free=free, needs=[*beside, *others], num_attention=0),
        *(
            _Memory(
                where=f"GPU {gpu}",
                free=gpu_free,
                needs=workers[gpu::num_gpus],
                num_attention=len(range(gpu, num_attention, num_gpus)),
            )
            for gpu, gpu_free in enumerate(gpus_free)
        ),
    ]


def _worker_needs(config: ServeConfig, checkpoint: Checkpoint) -> list[MemoryNeeds]:
    """Of the workers of both pools, attention first."""
    pools, model, spec = config.pools, config.model, checkpoint.spec
    placement = first_placement(pools, spec)
    if config.transport == "local":
        monolith = monolith_needs(checkpoint, config.engine, model, placement)
        return [monolith] * pools.attention_workers
    attention = attention_needs(
        checkpoint, config.engine, model, num_expert_workers=pools.expert_workers
    )
    num_tokens = pools.attention_workers * config.engine.max_batch_tokens
    return [
        *[attention] * pools.attention_workers,
        *(
            expert_needs(spec, placement, worker, model, num_tokens=num_tokens)
            for worker in range(pools.expert_workers)
        ),
    ]
