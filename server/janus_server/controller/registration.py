"""What a worker says of itself when it registers, and whether it may take part."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from janus_proto.v1 import control_pb2
from janus_scheduler.activation import ActivationCosts
from janus_scheduler.request import check_range
from janus_server.addresses import split_address
from janus_server.comm.config import MAX_BATCH_TOKENS
from janus_server.comm.epoch import costs_of
from janus_server.errors import ConfigError

logger = logging.getLogger(__name__)

ROLE_NAMES = {
    control_pb2.WORKER_ROLE_ATTENTION: "attention",
    control_pb2.WORKER_ROLE_EXPERT: "expert",
}

_MAX_ADDRESS_CHARS = 300
"""A host's name has up to 253."""
_MAX_IDENTITY_BYTES = 2**14


class RegistrationRefusedError(Exception):
    """The worker must not take part; the message is one sentence for its operator."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployment:
    """What all workers must agree in."""

    fingerprint: str
    """Of the checkpoint."""
    dtype: str
    """Number format of weights and activations."""
    comm_timeout_s: float
    """Longest silence of a peer: each shows life as often as its own timeout asks for."""
    has_expert_workers: bool
    """Otherwise each attention worker holds all experts itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Registration:
    """A worker that may take part."""

    role: "control_pb2.WorkerRole.ValueType"
    address: str
    """HOST:PORT of its gRPC service; empty: it has none."""
    pid: int
    costs: ActivationCosts | None
    """What an expert worker measured on itself."""
    compute: control_pb2.ComputeIdentity
    max_batch_tokens: int
    """Of an attention worker's step; 0 for an expert worker."""


def check_registration(
    request: control_pb2.RegisterRequest, deployment: Deployment
) -> Registration:
    """Read a worker's registration; raises RegistrationRefusedError."""
    if request.role not in ROLE_NAMES:
        raise RegistrationRefusedError("a worker must register as attention or expert worker")
    worker = f"the {ROLE_NAMES[request.role]} worker with process id {request.pid}"
    difference = _difference(request, deployment)
    if difference:
        raise RegistrationRefusedError(f"{worker} {difference}")
    if request.compute.ByteSize() > _MAX_IDENTITY_BYTES:
        raise RegistrationRefusedError(f"{worker} says too much of what it computes with")
    has_costs = request.HasField("activation_costs")
    try:
        _check_address(request)
        _check_batch(request)
        costs = costs_of(request.activation_costs) if has_costs else None
    except (ConfigError, ValueError) as error:
        raise RegistrationRefusedError(f"{worker} cannot take part: {error}") from None
    return Registration(
        role=request.role,
        address=request.address,
        pid=request.pid,
        costs=costs,
        compute=request.compute,
        max_batch_tokens=request.max_batch_tokens,
    )


def _difference(request: control_pb2.RegisterRequest, deployment: Deployment) -> str:
    """In what the worker does not agree, to follow its name; empty: it agrees in all."""
    if request.model_fingerprint != deployment.fingerprint:
        return "serves another model than this controller: their configurations or weights differ"
    if request.dtype != deployment.dtype:
        return f"computes in {request.dtype[:16]}, this deployment in {deployment.dtype}"
    if request.comm_timeout_s != deployment.comm_timeout_s:
        return (
            f"has --comm-timeout-s {request.comm_timeout_s}, this controller "
            f"{deployment.comm_timeout_s}: all processes of a cluster need the same"
        )
    if request.holds_experts and deployment.has_expert_workers:
        return (
            "holds all experts itself, but this controller waits for expert workers: monoliths "
            "need --expert-workers 0 there"
        )
    if not request.holds_experts and not deployment.has_expert_workers:
        return (
            "cannot take part: this controller has --expert-workers 0, and that is for monoliths "
            "(janus_server.monolith), which hold all experts themselves"
        )
    return ""


def _check_batch(request: control_pb2.RegisterRequest) -> None:
    if request.role == control_pb2.WORKER_ROLE_ATTENTION:
        check_range("max_batch_tokens", request.max_batch_tokens, 1, MAX_BATCH_TOKENS)
    elif request.max_batch_tokens:
        raise ValueError("an expert worker has no steps of its own")


def warn_of_differences(experts: Mapping[str, Registration]) -> None:
    """Log, for each kind of expert worker, how it differs from the first; keys are worker ids."""
    warned: set[tuple[str, ...]] = {()}
    for worker_id, registration in experts.items():
        first_id, first = next(iter(experts.items()))
        found = compute_differences(first.compute, registration.compute)
        if tuple(found) not in warned:
            warned.add(tuple(found))
            logger.warning(
                "%s and %s may round differently, and then choose different experts for a token: "
                "%s",
                first_id,
                worker_id,
                "; ".join(found),
            )


def compute_differences(
    first: control_pb2.ComputeIdentity, second: control_pb2.ComputeIdentity
) -> list[str]:
    """What differs, each as "torch 2.11.0 and 2.13.0"; empty where nothing does."""
    of_first, of_second = _facts(first), _facts(second)
    return [
        f"{name} {of_first.get(name, 'none')} and {of_second.get(name, 'none')}"
        for name in sorted(of_first.keys() | of_second.keys())
        if of_first.get(name) != of_second.get(name)
    ]


def _check_address(request: control_pb2.RegisterRequest) -> None:
    if request.role == control_pb2.WORKER_ROLE_EXPERT and not request.address:
        return
    if len(request.address) > _MAX_ADDRESS_CHARS:
        raise ValueError(f"its address has {len(request.address)} characters")
    _, port = split_address(request.address)
    if port == 0:
        raise ValueError(f"its address {request.address} has no port")


def _facts(identity: control_pb2.ComputeIdentity) -> dict[str, str]:
    return {
        "device": identity.device,
        "instruction set of torch": identity.cpu_capability or "none",
        "oneDNN": "yes" if identity.has_onednn else "none",
        "threads": str(identity.threads),
        **dict.fromkeys(identity.cpu_features, "yes"),
        **identity.versions,
    }
