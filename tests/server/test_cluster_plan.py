import dataclasses
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from janus_server import surroundings
from janus_server.attention.config import AttentionConfig, EngineConfig
from janus_server.cluster_plan import (
    check_config,
    controller_config,
    endpoint_config,
    worker_processes,
)
from janus_server.command_line import parse
from janus_server.config import ServeConfig
from janus_server.controller.config import PoolConfig
from janus_server.endpoint.config import AdmissionConfig
from janus_server.errors import CheckpointError, ConfigError
from janus_server.experts.config import ExpertConfig
from janus_server.model.config import ModelConfig
from janus_server.monolith.config import MonolithConfig
from janus_server.process import ProcessConfig
from tests.conftest import CheckpointFactory

CONTROLLER = "127.0.0.1:5"


@pytest.fixture
def config(make_checkpoint: CheckpointFactory) -> ServeConfig:
    """One that can work, on a model with 6 experts and 1024 positions."""
    return ServeConfig(
        model=ModelConfig(checkpoint=str(make_checkpoint())),
        admission=AdmissionConfig(listen="127.0.0.1:0"),
    )


def test_a_config_that_can_work_passes(config: ServeConfig) -> None:
    check_config(config)


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ({"pools": PoolConfig(expert_workers=0)}, "--expert-workers must be at least 1"),
        ({"pools": PoolConfig(expert_workers=7)}, "--expert-workers 7 .* has 6 experts"),
        ({"pools": PoolConfig(expert_slots=2)}, "2 expert workers with 2 .* cannot hold"),
        ({"pools": PoolConfig(expert_slots=7)}, "--expert-slots must be at most .* 6 experts"),
        (
            {"engine": EngineConfig(max_context=1)},
            "--max-context must be 0, or from 2 to .* not 1$",
        ),
        ({"engine": EngineConfig(max_context=1025)}, "--max-context .* model's 1024, not 1025"),
        ({"admission": AdmissionConfig(listen="50051")}, "is not HOST:PORT"),
        ({"admission": AdmissionConfig(listen="localhost:99999")}, "port of .* is above 65535"),
        # Sockets may listen on a multicast address, but TCP reaches none.
        ({"admission": AdmissionConfig(listen="224.0.0.1:0")}, "cannot reach itself at 224.0.0.1"),
    ],
)
def test_what_cannot_work_is_one_sentence(
    config: ServeConfig, part: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check_config(dataclasses.replace(config, **part))


def test_a_system_with_too_few_threads(
    config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_free = 5 * surroundings.threads_of_process()
    monkeypatch.setattr(surroundings, "_start_threads", lambda num_threads: num_free)
    with pytest.raises(ConfigError, match=f"^the 6 processes .* and only {num_free} more can be"):
        check_config(config)
    check_config(dataclasses.replace(config, transport="local"))


def test_a_damaged_tokenizer(config: ServeConfig, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(config.model.checkpoint, tmp_path / "model"))
    config = dataclasses.replace(config, model=ModelConfig(checkpoint=str(folder)))
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=f"{path} is not a usable tokenizer"):
        check_config(config)
    path.unlink()
    check_config(config)


def test_a_missing_checkpoint(config: ServeConfig) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint folder at /nowhere"):
        check_config(dataclasses.replace(config, model=ModelConfig(checkpoint="/nowhere")))


def test_a_port_in_use(config: ServeConfig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"cannot listen on {listen}: the port is in use"):
            check_config(dataclasses.replace(config, admission=AdmissionConfig(listen=listen)))


def test_each_process_is_handed_its_part(config: ServeConfig) -> None:
    engine = EngineConfig(lanes=2, max_context=100)
    pools = PoolConfig(attention_workers=2, expert_workers=3)
    config = dataclasses.replace(config, engine=engine, pools=pools, threads=4)
    controller = controller_config(config)
    assert (controller.pools, controller.process.lifeline) == (pools, True)
    endpoint = endpoint_config(config, CONTROLLER)
    assert (endpoint.controller, endpoint.max_context) == (CONTROLLER, 100)
    workers = worker_processes(config, CONTROLLER, num_devices=1)
    assert [worker.name for worker in workers] == ["attention worker"] * 2 + ["expert worker"] * 3
    assert parse(AttentionConfig, workers[0].argv, prog="p") == AttentionConfig(
        model=config.model,
        engine=engine,
        comm=config.comm,
        controller=CONTROLLER,
        threads=4,
        process=ProcessConfig(log_level="warning", lifeline=True),
    )
    assert parse(ExpertConfig, workers[-1].argv, prog="p") == ExpertConfig(
        model=config.model,
        comm=config.comm,
        controller=CONTROLLER,
        threads=4,
        process=ProcessConfig(log_level="warning", lifeline=True),
    )


def test_workers_take_devices_in_turn(config: ServeConfig) -> None:
    config = dataclasses.replace(config, pools=PoolConfig(attention_workers=2, expert_workers=3))
    attention, experts = (2, AttentionConfig), (3, ExpertConfig)
    workers = iter(worker_processes(config, CONTROLLER, num_devices=4))
    indices = [
        parse(cls, next(workers).argv, prog="p").device_index
        for count, cls in (attention, experts)
        for _ in range(count)
    ]
    assert indices == [0, 1, 2, 3, 0]


def test_transport_local_is_monolithic_workers_alone(config: ServeConfig) -> None:
    pools = PoolConfig(attention_workers=2, expert_workers=3)
    config = dataclasses.replace(config, pools=pools, transport="local")
    assert controller_config(config).pools == PoolConfig(attention_workers=2, expert_workers=0)
    workers = worker_processes(config, CONTROLLER, num_devices=1)
    assert [worker.module for worker in workers] == ["janus_server.monolith"] * 2
    assert parse(MonolithConfig, workers[0].argv, prog="p").pools.expert_workers == 3
