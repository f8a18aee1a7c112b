"""The life of an expert worker: register, load its slots, meet the epoch's group, serve, stop."""

import asyncio
import logging
import threading
from collections.abc import Sequence

import torch

from janus_proto.v1 import control_pb2
from janus_server.comm.control_client import ControlClient, wait_for_epoch
from janus_server.comm.epoch import group_config, placement_of
from janus_server.comm.gloo import GlooAttentionPool
from janus_server.comm.gloo_group import join_group
from janus_server.comm.lifecycle import in_daemon_thread, run_until_stopped
from janus_server.experts.config import ExpertConfig
from janus_server.experts.runner import ExpertRunner
from janus_server.experts.weights import load_layers
from janus_server.model.checkpoint import Checkpoint
from janus_server.model.cpu import use_cpu
from janus_server.model.weights import WeightReader, device_of, dtype_of

logger = logging.getLogger(__name__)

_CLOSE_GRACE_S = 10.0
"""How long the attention workers may take to close after this worker was told to stop."""


async def main(config: ExpertConfig, stop: asyncio.Event) -> None:
    """Serve as an expert worker until the attention workers close, or `stop` and a grace."""
    use_cpu(config.threads)
    checkpoint = Checkpoint.open(config.model.checkpoint)
    control = ControlClient(config.controller)
    try:
        await run_until_stopped(
            _serve_epoch(config, checkpoint, control), stop=stop, control=control
        )
    finally:
        await control.close()


async def _serve_epoch(
    config: ExpertConfig, checkpoint: Checkpoint, control: ControlClient
) -> None:
    worker_id = await control.register(
        control_pb2.WORKER_ROLE_EXPERT,
        address="",
        fingerprint=checkpoint.fingerprint,
        timeout_s=config.comm.startup_timeout_s,
    )
    epoch = await wait_for_epoch(control, timeout_s=config.comm.startup_timeout_s)
    group = group_config(epoch, worker_id, config.comm)
    device, dtype = device_of(config.model, config.device_index), dtype_of(config.model)

    def load() -> ExpertRunner:
        with WeightReader(checkpoint, dtype=dtype, device=device) as reader:
            index = group.expert_ranks.index(group.rank)
            return ExpertRunner(checkpoint.spec, load_layers(reader, placement_of(epoch), index))

    def join() -> GlooAttentionPool:
        return GlooAttentionPool(
            join_group(group),
            group,
            hidden_size=checkpoint.spec.hidden_size,
            dtype=dtype,
            device=device,
        )

    runner = await in_daemon_thread(load)
    pool = await in_daemon_thread(join)
    control.expert_load = lambda: expert_load(runner)
    control.set_ready(epoch.number)
    logger.info("%s serves epoch %d", worker_id, epoch.number)
    steps = _Steps(pool, runner, checkpoint.spec.moe_layers)
    try:
        await asyncio.shield(steps.done)
    finally:
        # The attention workers say when no step follows: leaving earlier would cut one short.
        await asyncio.to_thread(steps.thread.join, _CLOSE_GRACE_S)


class _Steps:
    """The thread that runs the epoch's steps."""

    def __init__(
        self, pool: GlooAttentionPool, runner: ExpertRunner, moe_layers: Sequence[int]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.done: asyncio.Future[None] = self._loop.create_future()
        # Its failure is logged; that nobody may be waiting for it any more is no second one.
        self.done.add_done_callback(lambda done: done.cancelled() or done.exception())
        # A daemon: a peer that hangs must not keep this process from ending.
        self.thread = threading.Thread(
            target=self._run, args=(pool, runner, moe_layers), name="steps", daemon=True
        )
        self.thread.start()

    def _run(
        self, pool: GlooAttentionPool, runner: ExpertRunner, moe_layers: Sequence[int]
    ) -> None:
        error: Exception | None = None
        try:
            with torch.inference_mode():
                pool.serve(runner.partial, moe_layers)
        except Exception as caught:
            logger.error("the expert worker stopped: %s", caught)
            error = caught
        self._loop.call_soon_threadsafe(self._finish, error)

    def _finish(self, error: Exception | None) -> None:
        if self.done.done():  # cancelled, as the worker was told to stop
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)


def expert_load(runner: ExpertRunner) -> control_pb2.ExpertLoad:
    """What a heartbeat reports."""
    return control_pb2.ExpertLoad(
        num_layer_steps=runner.num_layer_steps,
        num_activated_experts=runner.num_activated_experts,
        num_token_pairs=runner.num_token_pairs,
    )
