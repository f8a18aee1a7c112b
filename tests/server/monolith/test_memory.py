import asyncio
from pathlib import Path

import pytest

from janus_scheduler.placement import round_robin
from janus_server.attention.config import AttentionConfig, EngineConfig
from janus_server.attention.memory import attention_needs
from janus_server.errors import ConfigError
from janus_server.experts.memory import expert_needs
from janus_server.model.checkpoint import Checkpoint
from janus_server.model.config import ModelConfig
from janus_server.monolith.config import MonolithConfig
from janus_server.monolith.memory import monolith_needs
from janus_server.monolith.worker import main
from tests.conftest import CheckpointFactory


@pytest.fixture
def folder(make_checkpoint: CheckpointFactory) -> Path:
    return make_checkpoint()


def test_attention_and_every_share_of_the_experts_in_one_process(folder: Path) -> None:
    checkpoint, model = Checkpoint.open(folder), ModelConfig(checkpoint=str(folder))
    spec, engine = checkpoint.spec, EngineConfig(kv_cache_gib=1.0)
    placement = round_robin(moe_layers=spec.moe_layers, num_experts=spec.num_experts, num_workers=3)
    needs = monolith_needs(checkpoint, engine, model, placement)
    attention = attention_needs(checkpoint, engine, model, num_expert_workers=3)
    experts = [expert_needs(spec, placement, share, model, num_tokens=1) for share in range(3)]
    assert needs.weights == attention.weights + sum(share.weights for share in experts)
    assert (needs.kv_cache, needs.process) == (2**30, attention.process)
    assert needs.working_buffers > attention.working_buffers


def test_nothing_starts_where_it_does_not_fit(folder: Path) -> None:
    config = MonolithConfig(
        attention=AttentionConfig(
            model=ModelConfig(checkpoint=str(folder)),
            engine=EngineConfig(kv_cache_gib=2**16),
            controller="127.0.0.1:1",
        )
    )
    with pytest.raises(ConfigError, match=r"monolithic worker needs .* KV cache 65,536 GiB"):
        asyncio.run(main(config, asyncio.Event()))
