"""Who is there, who is ready, and which epoch they form. No clock, no socket: time is an argument.

An epoch is immutable; only the readiness of its members changes. The first is formed as soon as
both pools have as many living workers as were asked for; workers beyond that are known but stay
outside. A worker that has sent no heartbeat yet may not know that it is registered, and does not
count. `version` grows with everything that a watcher would see differently.

A worker is one registration. An id is never given twice, and a heartbeat counts only with the
incarnation that its worker was told, so that nobody speaks for another: not a worker that has
registered again, nor one that knows another controller.
"""

import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from janus_proto.v1 import control_pb2
from janus_scheduler.activation import Scheduling
from janus_scheduler.model_spec import ModelSpec
from janus_scheduler.placement import Placement
from janus_server.controller.activity import ExpertActivity
from janus_server.controller.config import PoolConfig, ScheduleConfig
from janus_server.controller.registration import (
    ROLE_NAMES,
    Deployment,
    Registration,
    RegistrationRefusedError,
    check_registration,
    warn_of_differences,
)
from janus_server.controller.scheduling import agreed_scheduling
from janus_server.errors import ConfigError, InvalidRequestError

logger = logging.getLogger(__name__)

HEARTBEAT_INTERVAL_S = 1.0
"""How often each worker shows that it lives, in seconds."""

LOST_AFTER_S = 10 * HEARTBEAT_INTERVAL_S
"""A worker silent for longer counts as lost until it is heard of again, in seconds."""

FORGOTTEN_AFTER_S = 60 * HEARTBEAT_INTERVAL_S
"""A lost worker outside the epoch is forgotten once it was silent for longer, in seconds."""

MAX_MEMBERS = 4096
"""Workers that are known at once; an epoch has up to 2048."""

_MAX_SHOWN_CHARS = 64


class UnknownWorkerError(Exception):
    """A heartbeat came from a worker that did not register here, or was forgotten."""


@dataclass(kw_only=True, slots=True)
class Member:
    """A registered worker."""

    worker_id: str
    incarnation: str
    """What its heartbeats carry, and nobody can guess."""
    registration: Registration
    last_heard_s: float
    has_beaten: bool = False
    """Whether it has sent a heartbeat."""
    lost: bool = False
    has_left: bool = False
    """Whether it said that it was told to stop."""
    ready_epoch: int = 0
    """The epoch it is ready to serve; 0: none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochPlan:
    """One fixed set of workers and one placement."""

    number: int
    """Counted from 1."""
    attention_workers: tuple[Member, ...]
    """In the order of their ranks, which start at 0."""
    expert_workers: tuple[Member, ...]
    """In the order of their ranks, which follow those of the attention workers."""
    placement: Placement | None
    """None: without expert workers."""
    scheduling: Scheduling | None
    """None: without expert workers."""
    ranks: Mapping[str, int]
    """Worker id -> rank."""


def check_pools(pools: PoolConfig, spec: ModelSpec) -> None:
    """Refuse pools that cannot serve the model; without expert workers, attention workers alone do.

    Raises ConfigError.
    """
    workers, slots = pools.expert_workers, pools.expert_slots
    if workers > spec.num_experts:
        raise ConfigError(
            f"--expert-workers {workers} does not fit a model that has {spec.num_experts} experts"
        )
    if slots > spec.num_experts:
        raise ConfigError(
            f"--expert-slots must be at most the model's {spec.num_experts} experts, not {slots}"
        )
    if slots != 0 and 0 < workers * slots < spec.num_experts:
        raise ConfigError(
            f"{workers} expert workers with {slots} expert slots each cannot hold the model's "
            f"{spec.num_experts} experts"
        )


class Membership:
    """The workers of one model and the epoch that they form."""

    def __init__(
        self,
        *,
        deployment: Deployment,
        pools: PoolConfig,
        placement: Placement | None,
        schedule: ScheduleConfig,
    ) -> None:
        self.deployment = deployment
        """What all workers agree in."""
        self._pools = pools
        self._placement = placement
        self._schedule = schedule
        self._members: dict[str, Member] = {}
        self.epoch: EpochPlan | None = None
        self.activity = ExpertActivity(placement)
        self.version = 0
        self._num_registered = dict.fromkeys(ROLE_NAMES, 0)
        """Role -> workers that have ever registered."""
        self._expired_s: float | None = None
        """When `expire` was last called."""

    def register(self, request: control_pb2.RegisterRequest, *, now_s: float) -> Member:
        """Add a worker; raises RegistrationRefusedError."""
        registration = check_registration(request, self.deployment)
        if len(self._members) >= MAX_MEMBERS:
            raise RegistrationRefusedError(f"{MAX_MEMBERS} workers have registered already")
        role = registration.role
        member = Member(
            worker_id=f"{ROLE_NAMES[role]}-{self._num_registered[role]}",
            incarnation=secrets.token_hex(16),
            registration=registration,
            last_heard_s=now_s,
        )
        self._num_registered[role] += 1
        self._members[member.worker_id] = member
        logger.info("%s registered (pid %d)", member.worker_id, registration.pid)
        self.version += 1
        return member

    def heartbeat(
        self,
        worker_id: str,
        *,
        incarnation: str,
        ready_epoch: int,
        now_s: float,
        leaving: bool = False,
        load: control_pb2.ExpertLoad | None = None,
    ) -> None:
        """Note that a worker lives, or leaves, and its load if it says so.

        Raises UnknownWorkerError, and InvalidRequestError for an epoch that it is no member of.
        """
        member = self._members.get(worker_id)
        if member is None or not secrets.compare_digest(
            member.incarnation.encode(), incarnation.encode()
        ):
            raise UnknownWorkerError(
                f"this controller does not know the worker {worker_id[:_MAX_SHOWN_CHARS]!a}, or "
                "not this incarnation of it"
            )
        if ready_epoch and not self._is_member(worker_id, ready_epoch):
            raise InvalidRequestError(f"{worker_id} is no member of an epoch {ready_epoch}")
        member.last_heard_s = now_s
        if leaving:
            pid = member.registration.pid
            logger.warning("%s (pid %d) left: it was told to stop", worker_id, pid)
            member.has_left = member.lost = True
            self.version += 1
            return
        if member.lost:
            logger.warning("%s is back", worker_id)
        if not member.has_beaten or member.lost or member.ready_epoch != ready_epoch:
            member.has_beaten = True
            member.lost = False
            member.ready_epoch = ready_epoch
            if self.epoch is None:
                self._try_form_epoch(number=1)
            self.version += 1
        if load is not None:
            experts = self.epoch.expert_workers if self.epoch else ()
            leads = bool(experts) and experts[0] is member
            self.activity.report(worker_id, load, now_s, leads=leads)

    def who_left(self, worker_id: str) -> str:
        """An expert worker without which this worker's epoch cannot go on; empty: none."""
        if self.epoch is None or not self._is_member(worker_id):
            return ""
        return next(
            (worker.worker_id for worker in self.epoch.expert_workers if worker.has_left), ""
        )

    def expire(self, now_s: float) -> None:
        """Mark the workers lost that have been silent for longer than LOST_AFTER_S.

        Call it once a heartbeat interval: where it comes later, this process was held up, and what
        it did not hear meanwhile says nothing of the workers.
        """
        late_s = 0.0
        if self._expired_s is not None:
            late_s = max(now_s - self._expired_s - 2 * HEARTBEAT_INTERVAL_S, 0.0)
        self._expired_s = now_s
        for member in self.members():
            member.last_heard_s = min(member.last_heard_s + late_s, now_s)
            silent_s = now_s - member.last_heard_s
            if silent_s > LOST_AFTER_S and not member.lost:
                logger.error("%s is lost: silent for %.1f s", member.worker_id, silent_s)
                member.lost = True
                self.version += 1
            if silent_s > FORGOTTEN_AFTER_S and not self._is_member(member.worker_id):
                logger.info("%s is forgotten", member.worker_id)
                del self._members[member.worker_id]
                self.activity.forget(member.worker_id)
                self.version += 1

    def is_ready(self, member: Member) -> bool:
        """Whether the worker lives and is ready to serve the current epoch."""
        return (
            self.epoch is not None and member.ready_epoch == self.epoch.number and not member.lost
        )

    def members(self) -> tuple[Member, ...]:
        """All registered workers, in registration order, in the epoch or outside."""
        return tuple(self._members.values())

    def _is_member(self, worker_id: str, number: int | None = None) -> bool:
        """Whether it takes part in the epoch, which has this number where one is given."""
        epoch = self.epoch
        return epoch is not None and worker_id in epoch.ranks and number in (None, epoch.number)

    def _of_role(self, role: "control_pb2.WorkerRole.ValueType") -> list[Member]:
        return [member for member in self._members.values() if member.registration.role == role]

    def _try_form_epoch(self, *, number: int) -> None:
        attention, experts = (
            [worker for worker in self._of_role(role) if worker.has_beaten and not worker.lost][
                :wanted
            ]
            for role, wanted in (
                (control_pb2.WORKER_ROLE_ATTENTION, self._pools.attention_workers),
                (control_pb2.WORKER_ROLE_EXPERT, self._pools.expert_workers),
            )
        )
        if (len(attention), len(experts)) != (
            self._pools.attention_workers,
            self._pools.expert_workers,
        ):
            return
        self.epoch = EpochPlan(
            number=number,
            ranks={member.worker_id: rank for rank, member in enumerate([*attention, *experts])},
            attention_workers=tuple(attention),
            expert_workers=tuple(experts),
            placement=self._placement if experts else None,
            scheduling=(
                agreed_scheduling(self._schedule, [member.registration for member in experts])
                if experts
                else None
            ),
        )
        logger.info(
            "epoch %d: %d attention and %d expert workers", number, len(attention), len(experts)
        )
        warn_of_differences({member.worker_id: member.registration for member in experts})
