"""The control service: membership over gRPC.

All calls run on one event loop, so that nothing needs a lock.
"""

import asyncio
from collections.abc import AsyncIterator

import grpc
import grpc.aio

from janus_proto.v1 import control_pb2
from janus_proto.v1.control_pb2_grpc import ControlServiceServicer
from janus_server.comm.epoch import placement_message, scheduling_message
from janus_server.controller.membership import (
    HEARTBEAT_INTERVAL_S,
    EpochPlan,
    Member,
    Membership,
    UnknownWorkerError,
)
from janus_server.controller.registration import RegistrationRefusedError
from janus_server.errors import OverloadedError

MAX_WATCHERS = 4096
"""Streams of epochs at once: each worker of an epoch has one, and who serves it."""

SERVICE_NAME = control_pb2.DESCRIPTOR.services_by_name["ControlService"].full_name


class ControlService(ControlServiceServicer):
    """Answers workers and watchers out of one Membership.

    `store_address` is the HOST:PORT of the store in which the members of an epoch meet.
    """

    def __init__(self, membership: Membership, *, store_address: str) -> None:
        self._membership = membership
        self._store_address = store_address
        self._changed = asyncio.Event()
        self._published_version = membership.version
        self._is_closing = False
        self._num_watchers = 0
        self._latest = self._state()
        self._state_version = membership.version

    async def Register(
        self,
        request: control_pb2.RegisterRequest,
        context: grpc.aio.ServicerContext[
            control_pb2.RegisterRequest, control_pb2.RegisterResponse
        ],
    ) -> control_pb2.RegisterResponse:
        """Add a worker; FAILED_PRECONDITION where it must not take part."""
        try:
            member = self._membership.register(request, now_s=_now_s())
        except RegistrationRefusedError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        self._publish()
        return control_pb2.RegisterResponse(
            worker_id=member.worker_id,
            incarnation=member.incarnation,
            heartbeat_interval_s=HEARTBEAT_INTERVAL_S,
        )

    async def Heartbeat(
        self,
        request: control_pb2.HeartbeatRequest,
        context: grpc.aio.ServicerContext[
            control_pb2.HeartbeatRequest, control_pb2.HeartbeatResponse
        ],
    ) -> control_pb2.HeartbeatResponse:
        """Note that a worker lives and what it is ready for; NOT_FOUND for an unknown one."""
        try:
            self._membership.heartbeat(
                request.worker_id,
                incarnation=request.incarnation,
                ready_epoch=request.ready_epoch,
                leaving=request.leaving,
                load=request.expert_load if request.HasField("expert_load") else None,
                now_s=_now_s(),
            )
        except UnknownWorkerError as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        self._publish()
        return control_pb2.HeartbeatResponse(left=self._membership.who_left(request.worker_id))

    async def WatchEpochs(
        self,
        request: control_pb2.WatchEpochsRequest,
        context: grpc.aio.ServicerContext[
            control_pb2.WatchEpochsRequest, control_pb2.WatchEpochsResponse
        ],
    ) -> AsyncIterator[control_pb2.WatchEpochsResponse]:
        """Stream the current state at once and again after every change."""
        if self._num_watchers >= MAX_WATCHERS:
            raise OverloadedError(f"{MAX_WATCHERS} watch this controller already")
        self._num_watchers += 1
        try:
            while not self._is_closing:
                # Taken before the state is read, so that no change falls between the two.
                changed = self._changed
                yield self._latest_state()
                await changed.wait()
        finally:
            self._num_watchers -= 1

    async def GetExpertLoads(
        self,
        request: control_pb2.GetExpertLoadsRequest,
        context: grpc.aio.ServicerContext[
            control_pb2.GetExpertLoadsRequest, control_pb2.GetExpertLoadsResponse
        ],
    ) -> control_pb2.GetExpertLoadsResponse:
        """Return what the expert workers last reported."""
        activity = self._membership.activity
        recent = activity.recent_tokens
        return control_pb2.GetExpertLoadsResponse(
            loads=[
                control_pb2.WorkerExpertLoad(
                    worker_id=member.worker_id, load=activity.loads.get(member.worker_id)
                )
                for member in self._membership.members()
                if member.registration.role == control_pb2.WORKER_ROLE_EXPERT
            ],
            recent_tokens=[
                control_pb2.RecentTokens(
                    layer=layer, expert_tokens=tokens_E.tolist(), half_life_s=recent.half_life_s
                )
                for layer, tokens_E in recent.of().items()
            ],
        )

    def expire(self) -> None:
        """Mark silent workers lost; to be called about once a heartbeat interval."""
        self._membership.expire(_now_s())
        self._publish()

    def close(self) -> None:
        """End the streams of all watchers."""
        self._is_closing = True
        self._changed.set()

    def _publish(self) -> None:
        if self._membership.version != self._published_version and not self._is_closing:
            self._published_version = self._membership.version
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()

    def _latest_state(self) -> control_pb2.WatchEpochsResponse:
        """The state, made once for all watchers."""
        if self._state_version != self._membership.version:
            self._state_version = self._membership.version
            self._latest = self._state()
        return self._latest

    def _state(self) -> control_pb2.WatchEpochsResponse:
        epoch = self._membership.epoch
        ranks = epoch.ranks if epoch else {}
        workers = {
            member.worker_id: self._worker(member, ranks.get(member.worker_id, 0))
            for member in self._membership.members()
        }
        return control_pb2.WatchEpochsResponse(
            epoch=None if epoch is None else self._epoch(epoch, workers),
            workers=workers.values(),
            model_fingerprint=self._membership.deployment.fingerprint,
            comm_timeout_s=self._membership.deployment.comm_timeout_s,
        )

    def _worker(self, member: Member, rank: int) -> control_pb2.Worker:
        return control_pb2.Worker(
            worker_id=member.worker_id,
            role=member.registration.role,
            rank=rank,
            address=member.registration.address,
            pid=member.registration.pid,
            max_batch_tokens=member.registration.max_batch_tokens,
            ready=self._membership.is_ready(member),
        )

    def _epoch(self, epoch: EpochPlan, workers: dict[str, control_pb2.Worker]) -> control_pb2.Epoch:
        return control_pb2.Epoch(
            number=epoch.number,
            attention_workers=[workers[m.worker_id] for m in epoch.attention_workers],
            expert_workers=[workers[m.worker_id] for m in epoch.expert_workers],
            placement=None if epoch.placement is None else placement_message(epoch.placement),
            store_address=self._store_address,
            store_prefix=f"epoch-{epoch.number}",
            scheduling=None if epoch.scheduling is None else scheduling_message(epoch.scheduling),
        )


def _now_s() -> float:
    return asyncio.get_running_loop().time()
