import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc.aio
import pytest

from janus_proto.v1 import control_pb2
from janus_proto.v1.control_pb2_grpc import (
    ControlServiceStub,
    add_ControlServiceServicer_to_server,
)
from janus_server.comm.control_client import ControlClient, wait_for_epoch
from janus_server.controller import service as service_module
from janus_server.controller.config import PoolConfig
from janus_server.controller.service import SERVICE_NAME, ControlService
from janus_server.errors import ConfigError, UnavailableError
from janus_server.grpc_server import start_server
from tests.fakes.controller import members_of, registration
from tests.fakes.model_specs import SMALL_SPEC

ATTENTION = control_pb2.WORKER_ROLE_ATTENTION
EXPERT = control_pb2.WORKER_ROLE_EXPERT


@contextlib.asynccontextmanager
async def controller(*, attention: int = 1, experts: int = 1) -> AsyncIterator[str]:
    """Run a control service and yield its address."""
    pools = PoolConfig(attention_workers=attention, expert_workers=experts)
    membership = members_of(pools)
    service = ControlService(membership, store_address="store:1")
    server = await start_server(
        lambda grpc_server: add_ControlServiceServicer_to_server(service, grpc_server),
        [SERVICE_NAME],
        "127.0.0.1:0",
    )
    try:
        yield server.address
    finally:
        service.close()
        await server.stop(grace_s=10)


@contextlib.asynccontextmanager
async def client(address: str) -> AsyncIterator[ControlClient]:
    control = ControlClient(address)
    try:
        yield control
    finally:
        await control.close()


async def join(control: ControlClient, role: int, **fields: object) -> str:
    return await control.register(registration(role, **fields), timeout_s=30)


def test_workers_meet_in_an_epoch_and_become_ready() -> None:
    async def check() -> None:
        async with (
            controller() as address,
            client(address) as attention,
            client(address) as expert,
            client(address) as watcher,
            contextlib.aclosing(watcher.epochs()) as epochs,
        ):
            first = await anext(epochs)
            assert not first.HasField("epoch")
            assert await join(attention, ATTENTION) == "attention-0"
            assert await join(expert, EXPERT) == "expert-0"
            epoch = await wait_for_epoch(watcher, timeout_s=30)
            assert epoch.number == 1
            assert (epoch.store_address, epoch.store_prefix) == ("store:1", "epoch-1")
            assert [w.rank for w in (*epoch.attention_workers, *epoch.expert_workers)] == [0, 1]
            assert [layer.layer for layer in epoch.placement.layers] == list(SMALL_SPEC.moe_layers)
            attention.set_ready(1)
            expert.set_ready(1)
            async for state in epochs:
                if state.workers and all(worker.ready for worker in state.workers):
                    assert state.epoch.attention_workers[0].ready
                    break

    asyncio.run(check())


def test_who_leaves_is_named_to_the_others() -> None:
    async def check() -> None:
        async with (
            controller() as address,
            client(address) as attention,
            client(address) as expert,
        ):
            await join(attention, ATTENTION)
            await join(expert, EXPERT)
            await wait_for_epoch(attention, timeout_s=30)
            await expert.leave()
            await asyncio.wait_for(attention.lost.wait(), 30)
            assert attention.loss == "expert-0 left the epoch: it was told to stop"
            assert not expert.lost.is_set()

    asyncio.run(check())


def test_without_expert_workers_the_epoch_has_no_placement() -> None:
    async def check() -> None:
        async with controller(experts=0) as address, client(address) as worker:
            await join(worker, ATTENTION, holds_experts=True)
            epoch = await wait_for_epoch(worker, timeout_s=30)
            assert not epoch.HasField("placement")
            assert len(epoch.attention_workers) == 1

    asyncio.run(check())


def test_waiting_for_an_epoch_says_who_has_registered() -> None:
    async def check() -> None:
        async with controller(experts=2) as address, client(address) as worker:
            await join(worker, EXPERT)
            with pytest.raises(UnavailableError, match="only 0 attention and 1 expert workers"):
                await wait_for_epoch(worker, timeout_s=0.2)

    asyncio.run(check())


def test_another_model_is_refused_in_one_sentence() -> None:
    async def check() -> None:
        async with controller() as address, client(address) as worker:
            with pytest.raises(ConfigError, match=r"the controller refused: .*another model"):
                await join(worker, EXPERT, model_fingerprint="other")

    asyncio.run(check())


def test_expert_loads_are_those_of_the_last_heartbeats() -> None:
    async def check() -> None:
        async with controller() as address, client(address) as worker:
            await join(worker, ATTENTION)
            async with client(address) as expert:
                expert.report_load(lambda: control_pb2.ExpertLoad(num_activated_experts=42))
                await join(expert, EXPERT)
                async with grpc.aio.insecure_channel(address) as channel:
                    stub = ControlServiceStub(channel)
                    async with asyncio.timeout(30):
                        while True:
                            request = control_pb2.GetExpertLoadsRequest()
                            [load] = (await stub.GetExpertLoads(request)).loads
                            if load.load.num_activated_experts:
                                break
            assert (load.worker_id, load.load.num_activated_experts) == ("expert-0", 42)

    asyncio.run(check())


def test_a_heartbeat_of_an_unknown_worker_is_not_found() -> None:
    async def check() -> None:
        async with controller() as address, grpc.aio.insecure_channel(address) as channel:
            stub = ControlServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Heartbeat(control_pb2.HeartbeatRequest(worker_id="expert-9"))
            assert caught.value.code() == grpc.StatusCode.NOT_FOUND
            assert "expert-9" in caught.value.details()

    asyncio.run(check())


def test_a_heartbeat_of_the_future_is_refused() -> None:
    async def check() -> None:
        async with controller(experts=0) as address, grpc.aio.insecure_channel(address) as channel:
            stub = ControlServiceStub(channel)
            registered = await stub.Register(registration(ATTENTION, holds_experts=True))
            heartbeat = control_pb2.HeartbeatRequest(
                worker_id=registered.worker_id, incarnation=registered.incarnation, ready_epoch=2
            )
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Heartbeat(heartbeat)
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert caught.value.details() == "attention-0 is no member of an epoch 2"

    asyncio.run(check())


def test_watchers_are_bounded_and_those_that_end_make_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def check() -> None:
        async with controller() as address, grpc.aio.insecure_channel(address) as channel:
            stub = ControlServiceStub(channel)
            calls = [stub.WatchEpochs(control_pb2.WatchEpochsRequest()) for _ in range(3)]
            for call in calls:
                await call.read()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.WatchEpochs(control_pb2.WatchEpochsRequest()).read()
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            calls[0].cancel()
            async with asyncio.timeout(30):
                while True:
                    call = stub.WatchEpochs(control_pb2.WatchEpochsRequest())
                    with contextlib.suppress(grpc.aio.AioRpcError):
                        await call.read()
                        break

    monkeypatch.setattr(service_module, "MAX_WATCHERS", 3)
    asyncio.run(check())


def test_closing_ends_the_watchers() -> None:
    async def check() -> None:
        async with contextlib.AsyncExitStack() as stack:
            async with controller() as address:
                channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
                call = ControlServiceStub(channel).WatchEpochs(control_pb2.WatchEpochsRequest())
                await call.read()
                reading = asyncio.create_task(call.read())
            assert await asyncio.wait_for(reading, 30) is grpc.aio.EOF

    asyncio.run(check())
