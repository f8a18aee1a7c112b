"""What a worker reads out of an epoch: its place in the group, and the placement of experts."""

import numpy as np

from janus_proto.v1 import control_pb2
from janus_scheduler.placement import Placement
from janus_server.comm.gloo import GroupConfig
from janus_server.errors import UnavailableError


def group_config(epoch: control_pb2.Epoch, worker_id: str, *, timeout_s: float) -> GroupConfig:
    """The place of `worker_id` in the epoch's group."""
    return GroupConfig(
        store_address=epoch.store_address,
        prefix=epoch.store_prefix,
        rank=member(epoch, worker_id).rank,
        num_attention=len(epoch.attention_workers),
        num_experts=len(epoch.expert_workers),
        timeout_s=timeout_s,
    )


def member(epoch: control_pb2.Epoch, worker_id: str) -> control_pb2.Worker:
    """The worker as the epoch knows it; raises UnavailableError where it is no member."""
    for worker in (*epoch.attention_workers, *epoch.expert_workers):
        if worker.worker_id == worker_id:
            return worker
    raise UnavailableError(f"{worker_id} is not a member of epoch {epoch.number}: it is full")


def placement_of(epoch: control_pb2.Epoch) -> Placement:
    """The placement of the epoch's experts."""
    message = epoch.placement
    shape = (message.num_workers, message.slots_per_worker)
    return Placement(
        num_workers=message.num_workers,
        slots_per_worker=message.slots_per_worker,
        layers={
            one.layer: np.array(one.slot_experts, dtype=np.int32).reshape(shape)
            for one in message.layers
        },
    )
