from typing import Any

import pytest
import torch

from janus_server.attention.config import AttentionConfig, EngineConfig
from janus_server.attention.memory import attention_needs
from janus_server.attention.weights import load_attention_weights
from janus_server.attention.worker import fit_memory
from janus_server.errors import ConfigError
from janus_server.model.checkpoint import Checkpoint
from janus_server.model.config import ModelConfig
from janus_server.model.weights import WeightReader, dtype_of
from tests.conftest import CheckpointFactory
from tests.fakes.loaded_tensors import tensors_in


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "overrides", [{}, {"tie_word_embeddings": True}, {"mlp_only_layers": [1]}, {"hidden_size": 96}]
)
def test_weights_are_those_that_are_loaded(
    make_checkpoint: CheckpointFactory, overrides: dict[str, Any], dtype: Any
) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(**overrides))
    model = ModelConfig(checkpoint=str(checkpoint.path), dtype=dtype)
    with WeightReader(checkpoint, dtype=dtype_of(model), device=torch.device("cpu")) as reader:
        loaded = sum(tensor.nbytes for tensor in tensors_in(load_attention_weights(reader)))
    needs = attention_needs(checkpoint, EngineConfig(), model)
    rotary = 2 * 1024 * 16 * model.value_bytes
    # A norm of each head is repeated for all heads.
    assert loaded == pytest.approx(needs.weights - rotary, rel=0.02)


def test_more_of_anything_needs_more(make_checkpoint: CheckpointFactory) -> None:
    checkpoint = Checkpoint.open(make_checkpoint())
    model = ModelConfig(checkpoint=str(checkpoint.path))

    def total(num_expert_workers: int = 1, dtype: Any = "bf16", **config: Any) -> int:
        engine = EngineConfig(**{"kv_cache_gib": 1.0, **config})
        of_dtype = ModelConfig(checkpoint=model.checkpoint, dtype=dtype)
        return attention_needs(
            checkpoint, engine, of_dtype, num_expert_workers=num_expert_workers
        ).total

    for more in (
        {"kv_cache_gib": 2.0},
        {"max_batch_tokens": 4096},
        {"max_sequences": 128},
        {"num_expert_workers": 2},
        {"dtype": "fp32"},
    ):
        assert total(**more) > total(), more
    assert total(max_context=512) < total()


def test_a_worker_started_by_hand_sizes_its_own_cache(make_checkpoint: CheckpointFactory) -> None:
    checkpoint = Checkpoint.open(make_checkpoint())
    model = ModelConfig(checkpoint=str(checkpoint.path))

    def fitted(kv_cache_gib: float) -> AttentionConfig:
        engine = EngineConfig(kv_cache_gib=kv_cache_gib, max_context=160, max_sequences=2)
        return fit_memory(
            AttentionConfig(model=model, engine=engine, controller="127.0.0.1:1"),
            checkpoint.spec,
            lambda engine: attention_needs(checkpoint, engine, model),
        )

    assert fitted(0.001).engine.kv_cache_gib == 0.001
    # 384 bytes a token: the little that two sequences can use is there on any machine.
    assert fitted(0).engine.kv_cache_gib == 2 * 160 * 384 / 2**30
    with pytest.raises(ConfigError, match=r"attention worker needs .* KV cache 65,536 GiB"):
        fitted(2**16)
