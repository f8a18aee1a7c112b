"""The life of an attention worker: register, load, meet the epoch's group, serve, stop."""

import asyncio
import dataclasses
import logging
from collections.abc import Callable

from janus_proto.v1 import control_pb2, worker_pb2
from janus_proto.v1.worker_pb2_grpc import add_AttentionWorkerServiceServicer_to_server
from janus_scheduler.model_spec import ModelSpec
from janus_server.addresses import (
    advertised_host,
    join_address,
    own_address_towards,
    split_address,
)
from janus_server.attention.config import AttentionConfig, EngineConfig
from janus_server.attention.engine import Engine
from janus_server.attention.engine_thread import EngineThread, StepResult
from janus_server.attention.memory import attention_needs, free_kv_bytes, with_kv_bytes
from janus_server.attention.service import AttentionWorkerService
from janus_server.attention.weights import load_attention_weights
from janus_server.comm.authentication import read_secret, start_internal_server
from janus_server.comm.base import ExpertPool
from janus_server.comm.config import SIGNS_PER_TIMEOUT
from janus_server.comm.control_client import ControlClient, wait_for_epoch
from janus_server.comm.epoch import group_config
from janus_server.comm.gloo import GlooExpertPool
from janus_server.comm.gloo_group import join_group
from janus_server.comm.lifecycle import run_until_stopped
from janus_server.comm.work_thread import WorkThread
from janus_server.model.checkpoint import Checkpoint
from janus_server.model.compute_identity import compute_identity
from janus_server.model.cpu import use_cpu
from janus_server.model.gpu import free_device_memory
from janus_server.model.memory import MemoryNeeds, check_fits
from janus_server.model.weights import WeightReader, device_of, dtype_of
from janus_server.process import announce

logger = logging.getLogger(__name__)

_STOP_GRACE_S = 5.0
_STREAM_GRACE_S = 1.0

PoolFactory = Callable[[control_pb2.Epoch, str], ExpertPool]
"""(epoch, own worker id) -> the expert workers; blocks until they are met."""


async def main(config: AttentionConfig, stop: asyncio.Event) -> None:
    """Serve as an attention worker that meets its experts over gloo."""

    def join(epoch: control_pb2.Epoch, worker_id: str) -> ExpertPool:
        group = group_config(
            epoch,
            worker_id,
            config.comm,
            controller=config.controller,
            own_host=advertised_host(config.advertise_host)
            or own_address_towards(config.controller),
        )
        return GlooExpertPool(join_group(group), group)

    checkpoint = Checkpoint.open(config.model.checkpoint)

    def needs(engine: EngineConfig) -> MemoryNeeds:
        return attention_needs(checkpoint, engine, config.model)

    fitted = fit_memory(config, checkpoint.spec, needs)
    await serve(fitted, stop, checkpoint, join, holds_experts=False)


def fit_memory(
    config: AttentionConfig, spec: ModelSpec, needs: Callable[[EngineConfig], MemoryNeeds]
) -> AttentionConfig:
    """The same with a size for the KV cache, where it names none.

    Raises ConfigError where what the worker needs does not fit its device.
    """
    device, engine = device_of(config.model, config.device_index), config.engine
    free, where = free_device_memory(device)
    if not engine.kv_cache_gib:
        kv_bytes = free_kv_bytes(
            spec, engine, config.model, free=free, needs=[needs(engine)], num_sharing=1
        )
        engine = with_kv_bytes(engine, kv_bytes)
    check_fits([needs(engine)], free=free, where=where)
    return dataclasses.replace(config, engine=engine)


async def serve(
    config: AttentionConfig,
    stop: asyncio.Event,
    checkpoint: Checkpoint,
    join: PoolFactory,
    *,
    holds_experts: bool,
) -> None:
    """Serve until `stop`; `join` brings the experts, which this process holds or the epoch has."""
    use_cpu(config.threads)
    service = AttentionWorkerService()
    secret = read_secret(config.comm)
    control = ControlClient(config.controller, secret)
    host = advertised_host(config.advertise_host, config.listen)
    server = await start_internal_server(
        lambda grpc_server: add_AttentionWorkerServiceServicer_to_server(service, grpc_server),
        [worker_pb2.DESCRIPTOR.services_by_name["AttentionWorkerService"].full_name],
        config.listen,
        secret,
    )
    announce(server.address, config.process)
    address = join_address(
        host or own_address_towards(config.controller), split_address(server.address)[1]
    )
    try:
        await run_until_stopped(
            _serve_epoch(
                config, checkpoint, service, control, address, join, holds_experts=holds_experts
            ),
            stop=stop,
            control=control,
            has_parent=config.process.lifeline,
        )
    finally:
        service.close()
        await server.stop(_STREAM_GRACE_S)
        await control.close()


async def _serve_epoch(
    config: AttentionConfig,
    checkpoint: Checkpoint,
    service: AttentionWorkerService,
    control: ControlClient,
    address: str,
    join: PoolFactory,
    *,
    holds_experts: bool,
) -> None:
    fingerprint = await WorkThread(checkpoint.fingerprint, name="sampling the weights").result()
    worker_id = await control.register(
        control_pb2.RegisterRequest(
            role=control_pb2.WORKER_ROLE_ATTENTION,
            address=address,
            model_fingerprint=fingerprint,
            dtype=config.model.dtype,
            max_batch_tokens=config.engine.max_batch_tokens,
            comm_timeout_s=config.comm.comm_timeout_s,
            holds_experts=holds_experts,
            compute=compute_identity(device_of(config.model, config.device_index), config.threads),
        ),
        timeout_s=config.comm.startup_timeout_s,
    )
    loop = asyncio.get_running_loop()

    def publish(result: StepResult) -> None:
        loop.call_soon_threadsafe(service.publish, result)

    engine = await WorkThread(lambda: _load_engine(config, checkpoint), name="loading").result()
    epoch = await wait_for_epoch(control, timeout_s=config.comm.startup_timeout_s)
    pool = await WorkThread(lambda: join(epoch, worker_id), name="joining the group").result()
    keepalive_s = config.comm.comm_timeout_s / SIGNS_PER_TIMEOUT
    steps = EngineThread(engine, pool, publish=publish, keepalive_s=keepalive_s)
    thread = WorkThread(steps.run, name="the engine's step")
    watching = asyncio.create_task(service.watch(steps, keepalive_s), name="watching the engine")
    service.engine = steps
    control.set_ready(epoch.number)
    logger.info("%s serves epoch %d", worker_id, epoch.number)
    try:
        await thread.result()
    except asyncio.CancelledError:
        steps.stop()
        await thread.end(grace_s=_STOP_GRACE_S, abandon=pool.abandon)
        raise
    finally:
        watching.cancel()


def _load_engine(config: AttentionConfig, checkpoint: Checkpoint) -> Engine:
    device = device_of(config.model, config.device_index)
    with WeightReader(checkpoint, dtype=dtype_of(config.model), device=device) as reader:
        weights = load_attention_weights(reader)
    return Engine(checkpoint.spec, weights, config.engine)
