import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from janus_server.attention.config import EngineConfig
from janus_server.attention.memory import kv_block_bytes, most_blocks
from janus_server.cluster_memory import fit_memory
from janus_server.config import ServeConfig
from janus_server.controller.config import PoolConfig
from janus_server.errors import ConfigError
from janus_server.model.checkpoint import Checkpoint
from janus_server.model.config import ModelConfig
from tests.conftest import CheckpointFactory

MIB = 2**20

pools = st.builds(PoolConfig, attention_workers=st.integers(1, 5), expert_workers=st.integers(1, 6))
transports = st.sampled_from(["gloo", "local"])
free_bytes = st.integers(0, 8 * 2**30)


@pytest.fixture(scope="module")
def folder(make_checkpoint: CheckpointFactory) -> Path:
    return make_checkpoint()


def serve_config(folder: Path, engine: EngineConfig | None = None, **parts: Any) -> ServeConfig:
    # Long contexts of many sequences: more KV cache can be used than there is memory.
    engine = engine or EngineConfig(max_sequences=2**15)
    return ServeConfig(model=ModelConfig(checkpoint=str(folder)), engine=engine, **parts)


def kv_bytes(config: ServeConfig, **memory: Any) -> int:
    """KV cache of each attention worker; 0 where the processes do not fit."""
    try:
        return int(fit_memory(config, **memory).engine.kv_cache_gib * 2**30)
    except ConfigError:
        return 0


@given(pools=pools, transport=transports, free=free_bytes, more=free_bytes)
def test_shares_are_within_what_is_free_and_grow_with_it(
    folder: Path, pools: PoolConfig, transport: Any, free: int, more: int
) -> None:
    config = serve_config(folder, pools=pools, transport=transport)
    size = kv_bytes(config, free=free)
    assert 2 * pools.attention_workers * size <= max(free, 0)
    assert size <= kv_bytes(config, free=free + more)
    if size:
        # What was handed out is accepted as a size that somebody asked for, too.
        asked = dataclasses.replace(config, engine=EngineConfig(kv_cache_gib=size / 2**30))
        assert fit_memory(asked, free=free) == asked


@given(transport=transports, free=free_bytes, address_space=free_bytes)
def test_no_worker_takes_more_than_its_addresses_allow(
    folder: Path, transport: Any, free: int, address_space: int
) -> None:
    config = serve_config(folder, transport=transport)
    size = kv_bytes(config, free=free, address_space=address_space)
    assert 2 * size <= address_space
    assert size == min(
        kv_bytes(config, free=free, address_space=2**50),
        kv_bytes(config, free=2**50, address_space=address_space),
    )


def test_a_kv_cache_beyond_what_addresses_allow_is_one_sentence(folder: Path) -> None:
    config = serve_config(folder, EngineConfig(kv_cache_gib=5))
    assert fit_memory(config, free=2**40, address_space=6 * 2**30) == config
    sentence = (
        r"attention worker needs .* and the address space of a process \(ulimit -v, .*\) has 4 GiB"
    )
    with pytest.raises(ConfigError, match=sentence):
        fit_memory(config, free=2**40, address_space=4 * 2**30)


@pytest.mark.parametrize("transport", ["gloo", "local"])
@pytest.mark.parametrize(("block_size", "num_blocks"), [(1, 2), (2, 1), (16, 1)])
def test_a_kv_cache_that_holds_no_request(
    folder: Path, transport: Any, block_size: int, num_blocks: int
) -> None:
    engine = EngineConfig(block_size=block_size)
    block = kv_block_bytes(Checkpoint.open(folder).spec, engine, 2)
    least = dataclasses.replace(engine, kv_cache_gib=num_blocks * block / 2**30)
    config = serve_config(folder, least, transport=transport)
    assert fit_memory(config, free=2**40) == config
    less = dataclasses.replace(engine, kv_cache_gib=(num_blocks * block - 1) / 2**30)
    config = serve_config(folder, less, transport=transport)
    with pytest.raises(ConfigError, match=r"--kv-cache-gib .* is too small for any request"):
        fit_memory(config, free=2**40)


@given(pools=pools, free=free_bytes)
def test_more_workers_have_smaller_shares(folder: Path, pools: PoolConfig, free: int) -> None:
    larger = dataclasses.replace(pools, attention_workers=pools.attention_workers + 1)
    fewer, more = (serve_config(folder, pools=size) for size in (pools, larger))
    assert kv_bytes(more, free=free) <= kv_bytes(fewer, free=free)


@given(free=st.integers(4 * 2**30, 2**50))
def test_no_more_than_all_sequences_can_use(folder: Path, free: int) -> None:
    config = serve_config(folder, EngineConfig(max_sequences=3, max_context=100))
    spec = Checkpoint.open(folder).spec
    most = most_blocks(spec, config.engine) * kv_block_bytes(spec, config.engine, 2)
    assert kv_bytes(config, free=free) == most == 3 * 112 * 384


@given(gpus_free=st.lists(st.integers(2 * 2**30, 4 * 2**30), min_size=1, max_size=3))
def test_a_share_fits_every_gpu(folder: Path, gpus_free: list[int]) -> None:
    model = ModelConfig(checkpoint=str(folder), device="cuda")
    pools = PoolConfig(attention_workers=3, expert_workers=2)
    config = dataclasses.replace(serve_config(folder, pools=pools), model=model)
    size = kv_bytes(config, free=64 * 2**30, gpus_free=gpus_free)
    for index, free in enumerate(gpus_free):
        assert len(range(index, 3, len(gpus_free))) * size <= 0.9 * free
    assert kv_bytes(config, free=2**30, gpus_free=gpus_free) == 0


@pytest.mark.parametrize(
    ("parts", "free", "sentence"),
    [
        (
            {"engine": EngineConfig(kv_cache_gib=3000)},
            21 * 2**30,
            r"the attention worker needs 3,000\.\d GiB \(weights .*, KV cache 3,000 GiB, working "
            r"buffers \d+ MiB, process 512 MiB\), and this machine has 21 GiB available",
        ),
        (
            {"engine": EngineConfig(kv_cache_gib=12), "pools": PoolConfig(attention_workers=2)},
            21 * 2**30,
            r"the 6 processes need 26\.\d GiB \(.*, KV cache 24 GiB, .*has 21 GiB available",
        ),
        (
            {"transport": "local", "engine": EngineConfig(kv_cache_gib=30)},
            21 * 2**30,
            "the monolithic worker needs",
        ),
        ({}, 100 * MIB, "the attention worker needs"),
        ({}, 1024 * MIB, "the 5 processes need"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    folder: Path, parts: dict[str, Any], free: int, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        fit_memory(serve_config(folder, **parts), free=free)
