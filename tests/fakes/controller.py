"""A controller's membership, for a small model unless said otherwise."""

from typing import Any

from janus_proto.v1 import control_pb2
from janus_proto.v1.control_pb2 import RegisterRequest
from janus_scheduler.model_spec import ModelSpec
from janus_server.comm.config import CommConfig
from janus_server.controller.config import PoolConfig, ScheduleConfig
from janus_server.controller.membership import Membership
from janus_server.controller.placement import first_placement
from janus_server.controller.registration import Deployment
from tests.fakes.model_specs import SMALL_SPEC


def members_of(
    pools: PoolConfig,
    schedule: ScheduleConfig | None = None,
    *,
    spec: ModelSpec = SMALL_SPEC,
    fingerprint: str = "same",
    dtype: str = "bf16",
) -> Membership:
    placement = first_placement(pools, spec) if pools.expert_workers else None
    return Membership(
        deployment=Deployment(
            fingerprint=fingerprint,
            dtype=dtype,
            comm_timeout_s=CommConfig().comm_timeout_s,
            has_expert_workers=pools.expert_workers > 0,
        ),
        pools=pools,
        placement=placement,
        schedule=schedule or ScheduleConfig(),
    )


def registration(role: "control_pb2.WorkerRole.ValueType", **fields: Any) -> RegisterRequest:
    """What a worker of that deployment says of itself, unless `fields` say otherwise."""
    return RegisterRequest(
        **{
            "role": role,
            "address": "host:1",
            "pid": 1,
            "model_fingerprint": "same",
            "dtype": "bf16",
            "comm_timeout_s": CommConfig().comm_timeout_s,
            "max_batch_tokens": 64 if role == control_pb2.WORKER_ROLE_ATTENTION else 0,
            **fields,
        }
    )
