"""What attention and all experts need of memory in one process. Torch-free."""

from janus_scheduler.placement import Placement
from janus_server.attention.config import EngineConfig
from janus_server.attention.memory import attention_needs
from janus_server.experts.memory import expert_needs
from janus_server.model.checkpoint import Checkpoint
from janus_server.model.config import ModelConfig
from janus_server.model.memory import MemoryNeeds


def monolith_needs(
    checkpoint: Checkpoint, engine: EngineConfig, model: ModelConfig, placement: Placement
) -> MemoryNeeds:
    """What a monolithic worker needs, with the KV cache that `engine` names (0: without any)."""
    num_shares = placement.num_workers
    attention = attention_needs(checkpoint, engine, model, num_expert_workers=num_shares)
    experts = [
        expert_needs(checkpoint.spec, placement, share, model, num_tokens=engine.max_batch_tokens)
        for share in range(num_shares)
    ]
    return MemoryNeeds(
        name="monolithic worker",
        weights=attention.weights + sum(share.weights for share in experts),
        kv_cache=attention.kv_cache,
        # The largest only: the shares are computed one after another.
        working_buffers=attention.working_buffers + max(share.working_buffers for share in experts),
        process=attention.process,
    )
