"""The life of an expert worker: register, load its slots, meet the epoch's group, serve, stop."""

import asyncio
import logging
from collections.abc import Sequence

import torch

from janus_proto.v1 import control_pb2
from janus_server.addresses import advertised_host, own_address_towards
from janus_server.comm.authentication import read_secret
from janus_server.comm.control_client import ControlClient, wait_for_epoch
from janus_server.comm.epoch import costs_message, group_config, placement_of, scheduling_of
from janus_server.comm.gloo import GlooAttentionPool
from janus_server.comm.gloo_group import join_group
from janus_server.comm.lifecycle import run_until_stopped
from janus_server.comm.work_thread import WorkThread
from janus_server.experts.calibration import measure_costs
from janus_server.experts.config import ExpertConfig
from janus_server.experts.memory import expert_needs
from janus_server.experts.runner import ExpertRunner
from janus_server.experts.weights import load_layers
from janus_server.model.checkpoint import Checkpoint
from janus_server.model.compute_identity import compute_identity
from janus_server.model.cpu import use_cpu
from janus_server.model.gpu import free_device_memory
from janus_server.model.memory import check_fits
from janus_server.model.weights import WeightReader, device_of, dtype_of

logger = logging.getLogger(__name__)

_CLOSE_GRACE_S = 10.0
"""Time that attention workers have to close once this worker was told to stop, in seconds."""


async def main(config: ExpertConfig, stop: asyncio.Event) -> None:
    """Serve until the attention workers close, or until `stop` is set and a grace is over."""
    use_cpu(config.threads)
    checkpoint = Checkpoint.open(config.model.checkpoint)
    control = ControlClient(config.controller, read_secret(config.comm))
    try:
        await run_until_stopped(
            _serve_epoch(config, checkpoint, control),
            stop=stop,
            control=control,
            has_parent=config.process.lifeline,
        )
    finally:
        await control.close()


async def _serve_epoch(
    config: ExpertConfig, checkpoint: Checkpoint, control: ControlClient
) -> None:
    device, dtype = device_of(config.model, config.device_index), dtype_of(config.model)
    own_host = advertised_host(config.advertise_host) or own_address_towards(config.controller)
    worker_id = await _register(config, checkpoint, control)
    epoch = await wait_for_epoch(control, timeout_s=config.comm.startup_timeout_s)
    group = group_config(
        epoch, worker_id, config.comm, controller=config.controller, own_host=own_host
    )
    index = group.expert_ranks.index(group.rank)

    def join() -> GlooAttentionPool:
        return GlooAttentionPool(
            join_group(group),
            group,
            hidden_size=checkpoint.spec.hidden_size,
            dtype=dtype,
            device=device,
        )

    runner = await WorkThread(
        lambda: _load_runner(config, checkpoint, epoch, index), name="loading"
    ).result()
    pool = await WorkThread(join, name="joining the group").result()
    control.report_load(lambda: expert_load(runner))
    control.set_ready(epoch.number)
    logger.info("%s serves epoch %d", worker_id, epoch.number)
    steps = WorkThread(
        lambda: _serve(pool, runner, checkpoint.spec.moe_layers),
        name="serving the attention workers",
    )
    try:
        await steps.result()
    except asyncio.CancelledError:
        # The attention workers announce when no step follows; leaving earlier would break a step.
        await steps.end(grace_s=_CLOSE_GRACE_S, abandon=pool.abandon)
        raise


def _load_runner(
    config: ExpertConfig, checkpoint: Checkpoint, epoch: control_pb2.Epoch, worker: int
) -> ExpertRunner:
    device, spec = device_of(config.model, config.device_index), checkpoint.spec
    placement = placement_of(epoch, spec)
    num_tokens = sum(member.max_batch_tokens for member in epoch.attention_workers)
    needs = expert_needs(spec, placement, worker, config.model, num_tokens=num_tokens)
    free, where = free_device_memory(device)
    check_fits([needs], free=free, where=where)
    with WeightReader(checkpoint, dtype=dtype_of(config.model), device=device) as reader:
        layers = load_layers(reader, placement, worker)
    return ExpertRunner(spec, layers, worker=worker, scheduling=scheduling_of(epoch))


async def _register(config: ExpertConfig, checkpoint: Checkpoint, control: ControlClient) -> str:
    device, dtype = device_of(config.model, config.device_index), dtype_of(config.model)
    costs = await WorkThread(
        lambda: measure_costs(checkpoint.spec, dtype=dtype, device=device),
        name="measuring the experts",
    ).result()
    fingerprint = await WorkThread(checkpoint.fingerprint, name="sampling the weights").result()
    return await control.register(
        control_pb2.RegisterRequest(
            role=control_pb2.WORKER_ROLE_EXPERT,
            model_fingerprint=fingerprint,
            activation_costs=costs_message(costs),
            dtype=config.model.dtype,
            comm_timeout_s=config.comm.comm_timeout_s,
            compute=compute_identity(device, config.threads),
        ),
        timeout_s=config.comm.startup_timeout_s,
    )


@torch.inference_mode()
def _serve(pool: GlooAttentionPool, runner: ExpertRunner, moe_layers: Sequence[int]) -> None:
    pool.serve(runner.partial, moe_layers)


def expert_load(runner: ExpertRunner) -> control_pb2.ExpertLoad:
    """What a heartbeat reports."""
    counts = runner.counts()
    return control_pb2.ExpertLoad(
        num_layer_steps=sum(of_layer.num_steps for of_layer in counts.values()),
        num_activated_experts=sum(
            of_layer.experts_W[runner.worker] for of_layer in counts.values()
        ),
        num_token_pairs=sum(of_layer.tokens_W[runner.worker] for of_layer in counts.values()),
        layers=[
            control_pb2.LayerLoad(
                layer=layer,
                num_steps=of_layer.num_steps,
                sum_a_max=of_layer.sum_a_max,
                num_activated_experts=sum(of_layer.experts_W),
                expert_tokens=of_layer.tokens_E,
            )
            for layer, of_layer in counts.items()
        ],
    )
