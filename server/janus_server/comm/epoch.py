"""What an epoch's message means: a worker's place in the group, where experts are, who serves."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from janus_proto.v1 import control_pb2
from janus_scheduler.activation import POLICIES, ActivationCosts, SchedulePolicy, Scheduling
from janus_scheduler.model_spec import ModelSpec
from janus_scheduler.placement import Placement
from janus_scheduler.request import check_range
from janus_server.addresses import split_address
from janus_server.comm.config import MAX_BATCH_TOKENS, SIGNS_PER_TIMEOUT, CommConfig
from janus_server.errors import ConfigError, UnavailableError


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupConfig:
    """One worker's place in an epoch's group."""

    store_address: str
    """HOST:PORT of the TCP store."""
    own_host: str
    """Name or address of this machine at which the peers dial this worker."""
    prefix: str
    """Of the epoch's keys in the store."""
    rank: int
    """Of this worker; attention workers come first."""
    num_attention: int
    """Attention workers of the epoch."""
    num_experts: int
    """Expert workers of the epoch."""
    max_batch_tokens: tuple[int, ...]
    """For each attention worker: tokens of a step at most."""
    timeout_s: float
    """Longest silence of a peer that is expected to say something."""
    join_timeout_s: float
    """Deadline of the wait for all others to have loaded and come."""

    @property
    def sign_of_life_s(self) -> float:
        """Seconds between two signs of life to a peer that waits for nothing else."""
        return self.timeout_s / SIGNS_PER_TIMEOUT

    @property
    def expert_ranks(self) -> range:
        """Ranks of the expert workers."""
        return range(self.num_attention, self.num_attention + self.num_experts)


def group_config(
    epoch: control_pb2.Epoch, worker_id: str, comm: CommConfig, *, controller: str, own_host: str
) -> GroupConfig:
    """The place of `worker_id` in the epoch's group; `controller` is where it is dialled.

    The epoch is one that `check_epoch` has passed.
    """
    host, _, port = epoch.store_address.rpartition(":")
    return GroupConfig(
        store_address=f"{host or split_address(controller)[0]}:{port}",
        own_host=own_host,
        prefix=epoch.store_prefix,
        rank=member(epoch, worker_id).rank,
        num_attention=len(epoch.attention_workers),
        num_experts=len(epoch.expert_workers),
        max_batch_tokens=tuple(worker.max_batch_tokens for worker in epoch.attention_workers),
        timeout_s=comm.comm_timeout_s,
        join_timeout_s=comm.startup_timeout_s,
    )


def member(epoch: control_pb2.Epoch, worker_id: str) -> control_pb2.Worker:
    """The worker as the epoch knows it; raises UnavailableError where it is no member."""
    for worker in (*epoch.attention_workers, *epoch.expert_workers):
        if worker.worker_id == worker_id:
            return worker
    raise UnavailableError(f"{worker_id} is not a member of epoch {epoch.number}: it is full")


def check_epoch(epoch: control_pb2.Epoch) -> None:
    """Refuse an epoch whose parts do not fit each other; raises UnavailableError."""
    with _made_sense_of(epoch):
        members = (*epoch.attention_workers, *epoch.expert_workers)
        if not epoch.number or not epoch.attention_workers:
            raise ValueError("it has no number or no attention worker")
        if [worker.rank for worker in members] != list(range(len(members))):
            raise ValueError("its ranks are not those of its workers in order")
        if len({worker.worker_id for worker in members}) < len(members):
            raise ValueError("it has a worker twice")
        for worker in epoch.attention_workers:
            check_range("max_batch_tokens", worker.max_batch_tokens, 1, MAX_BATCH_TOKENS)
        if not epoch.expert_workers:
            return
        host, _, port = epoch.store_address.rpartition(":")
        split_address(f"{host or 'controller'}:{port}")
        if not epoch.store_prefix:
            raise ValueError("its keys in the store have no prefix")


def scheduling_of(epoch: control_pb2.Epoch) -> Scheduling:
    """Read how the epoch's expert workers choose replicas: the inverse of `scheduling_message`.

    Raises UnavailableError where the controller names a policy that this worker does not know, or
    costs that cannot be.
    """
    message = epoch.scheduling
    known: dict[str, SchedulePolicy] = {policy: policy for policy in POLICIES}
    policy = known.get(message.policy)
    if policy is None:
        raise UnavailableError(
            f"the controller asks for the schedule {message.policy!r}, but this worker knows: "
            + ", ".join(POLICIES)
        )
    with _made_sense_of(epoch):
        return Scheduling(policy=policy, costs=costs_of(message.costs))


def scheduling_message(scheduling: Scheduling) -> control_pb2.Scheduling:
    """Write it as its message."""
    return control_pb2.Scheduling(policy=scheduling.policy, costs=costs_message(scheduling.costs))


def costs_of(message: control_pb2.ActivationCosts) -> ActivationCosts:
    """Read measured costs; raises ValueError where one is 0."""
    return ActivationCosts(expert_ps=message.expert_ps, pair_ps=message.pair_ps)


def costs_message(costs: ActivationCosts) -> control_pb2.ActivationCosts:
    """Write measured costs as their message."""
    return control_pb2.ActivationCosts(expert_ps=costs.expert_ps, pair_ps=costs.pair_ps)


def placement_of(epoch: control_pb2.Epoch, spec: ModelSpec) -> Placement:
    """Read the placement of the epoch's experts: the inverse of `placement_message`.

    Raises UnavailableError where it is none of this model's on the epoch's expert workers.
    """
    with _made_sense_of(epoch):
        placement = _placement(epoch.placement)
        if placement.num_workers != len(epoch.expert_workers):
            raise ValueError(f"its placement is for {placement.num_workers} expert workers")
        if placement.layers.keys() != set(spec.moe_layers):
            raise ValueError("its placement is for other MoE layers")
        placement.check(spec.num_experts)
        return placement


def _placement(message: control_pb2.Placement) -> Placement:
    shape = (message.num_workers, message.slots_per_worker)
    if len({placement.layer for placement in message.layers}) < len(message.layers):
        raise ValueError("its placement has a layer twice")
    return Placement(
        num_workers=message.num_workers,
        slots_per_worker=message.slots_per_worker,
        layers={
            layer.layer: np.array(layer.slot_experts, dtype=np.int32).reshape(shape)
            for layer in message.layers
        },
    )


def placement_message(placement: Placement) -> control_pb2.Placement:
    """Write a placement as its message."""
    return control_pb2.Placement(
        num_workers=placement.num_workers,
        slots_per_worker=placement.slots_per_worker,
        layers=[
            control_pb2.LayerPlacement(layer=layer, slot_experts=slots_WS.ravel().tolist())
            for layer, slots_WS in placement.layers.items()
        ],
    )


@contextmanager
def _made_sense_of(epoch: control_pb2.Epoch) -> Iterator[None]:
    try:
        yield
    except (ValueError, ConfigError) as error:
        raise UnavailableError(
            f"epoch {epoch.number} of the controller cannot be used: {error}"
        ) from None
