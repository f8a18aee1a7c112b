"""Workers whose weights are replaced after they have registered, and before they have loaded."""

import asyncio
import shutil
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from janus_proto.v1 import control_pb2
from janus_proto.v1.control_pb2_grpc import add_ControlServiceServicer_to_server
from janus_server.attention import worker as attention_worker
from janus_server.attention.config import AttentionConfig, EngineConfig
from janus_server.controller.config import PoolConfig
from janus_server.controller.service import ControlService
from janus_server.errors import CheckpointError
from janus_server.experts import worker as expert_worker
from janus_server.experts.config import ExpertConfig
from janus_server.grpc_server import start_server
from janus_server.model.checkpoint import Checkpoint
from janus_server.model.config import ModelConfig
from janus_server.monolith import worker as monolithic_worker
from janus_server.monolith.config import MonolithConfig
from tests.conftest import CheckpointFactory
from tests.fakes.controller import members_of, registration
from tests.fakes.endpoint import within_deadline

ATTENTION, EXPERT = control_pb2.WORKER_ROLE_ATTENTION, control_pb2.WORKER_ROLE_EXPERT
Start = Callable[[ModelConfig, str, asyncio.Event], Coroutine[Any, Any, None]]


class ReplacingControlService(ControlService):
    """Registers a worker of `folder`, replaces its weights, and only then completes the epoch."""

    def __init__(self, folder: Path, pools: PoolConfig) -> None:
        self.weights = folder / "model.safetensors"
        self.ready_epochs: list[int] = []
        checkpoint = Checkpoint.open(folder)
        members = members_of(
            pools, spec=checkpoint.spec, fingerprint=checkpoint.fingerprint(), dtype="fp32"
        )
        super().__init__(members, store_address="127.0.0.1:1")

    async def Register(self, request: Any, context: Any) -> Any:
        response = await super().Register(request, context)
        shutil.copy(self.weights, self.weights.with_suffix(".new"))
        self.weights.with_suffix(".new").rename(self.weights)
        if request.role == EXPERT:
            same = {"model_fingerprint": request.model_fingerprint, "dtype": request.dtype}
            other = await super().Register(registration(ATTENTION, **same), context)
            heartbeat = control_pb2.HeartbeatRequest(
                worker_id=other.worker_id, incarnation=other.incarnation
            )
            await super().Heartbeat(heartbeat, context)
        return response

    async def Heartbeat(self, request: Any, context: Any) -> Any:
        self.ready_epochs.append(request.ready_epoch)
        return await super().Heartbeat(request, context)


def start_attention(model: ModelConfig, controller: str, stop: asyncio.Event) -> Any:
    return attention_worker.main(_attention_config(model, controller), stop)


def start_expert(model: ModelConfig, controller: str, stop: asyncio.Event) -> Any:
    return expert_worker.main(ExpertConfig(model=model, controller=controller), stop)


def start_monolith(model: ModelConfig, controller: str, stop: asyncio.Event) -> Any:
    config = MonolithConfig(attention=_attention_config(model, controller))
    return monolithic_worker.main(config, stop)


def _attention_config(model: ModelConfig, controller: str) -> AttentionConfig:
    engine = EngineConfig(kv_cache_gib=0.001, max_context=160)
    return AttentionConfig(model=model, engine=engine, controller=controller)


@pytest.mark.parametrize(
    ("start", "num_experts"), [(start_attention, 1), (start_expert, 1), (start_monolith, 0)]
)
def test_a_worker_ends_before_it_is_ready(
    make_checkpoint: CheckpointFactory, tmp_path: Path, start: Start, num_experts: int
) -> None:
    folder = Path(shutil.copytree(make_checkpoint(), tmp_path / "model"))

    async def check() -> None:
        service = ReplacingControlService(
            folder, PoolConfig(attention_workers=1, expert_workers=num_experts)
        )
        server = await start_server(
            lambda grpc_server: add_ControlServiceServicer_to_server(service, grpc_server),
            [],
            "127.0.0.1:0",
        )
        model = ModelConfig(checkpoint=str(folder), dtype="fp32")
        try:
            with pytest.raises(CheckpointError, match=r"model\.safetensors was changed or replac"):
                await start(model, server.address, asyncio.Event())
        finally:
            service.close()
            await server.stop(0)
        assert not any(service.ready_epochs)

    within_deadline(check())
