"""A whole Janus on this machine: the start and the end of its processes.

Order of the start: the controller, whose address the others need; then workers and endpoint
together. Order of the end: the endpoint, which drains while the workers still work; then the
workers; then the controller.
"""

import asyncio
import contextlib
import functools
import json
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import IO, Any, TypeVar

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from janus_proto.v1 import control_pb2
from janus_server.cluster_memory import fit_memory
from janus_server.cluster_plan import (
    controller_config,
    endpoint_config,
    with_secret_file,
    worker_processes,
)
from janus_server.comm.authentication import ClusterSecret, read_secret
from janus_server.comm.control_client import ControlClient
from janus_server.command_line import to_argv
from janus_server.config import ServeConfig
from janus_server.errors import ConfigError, JanusError, PeerLostError, UnavailableError
from janus_server.grpc_server import channel_options
from janus_server.model.memory import free_address_space, free_memory
from janus_server.supervisor import Child, Supervisor

T = TypeVar("T")

OnWorkerReady = Callable[[control_pb2.Worker], None]

_STOP_TIMEOUT_S = 15.0
"""How long workers and controller may take to end, in seconds."""

_FAILED_STOP_TIMEOUT_S = 3.0
"""The same once a process was lost: the others then end at once, unless they wait for one more."""

_DRAIN_MARGIN_S = 5.0
"""How much longer than its drain timeout the endpoint may take to end, in seconds."""

_HEALTH_POLL_S = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """A running Janus whose workers and endpoint are all ready."""

    address: str
    """HOST:PORT of the public endpoint."""
    controller: str
    """HOST:PORT of the control service."""
    secret: ClusterSecret
    """What calls to the controller and to the workers must show."""
    supervisor: Supervisor

    async def unless_failed(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work`, or cancel it and raise PeerLostError when a process ends unasked."""
        return await self.supervisor.unless_failed(work)

    async def wait_for_failure(self) -> None:
        """Wait until a process ends unasked, and raise PeerLostError that names it."""
        await self.supervisor.wait_for_failure()


@contextlib.asynccontextmanager
async def running_cluster(
    config: ServeConfig,
    *,
    on_worker_ready: OnWorkerReady = lambda worker: None,
    hurry: asyncio.Event | None = None,
    stderr: IO[bytes] | None = None,
) -> AsyncIterator[Cluster]:
    """Start everything that `config` means, and end it on leaving, whatever happens in between.

    The configuration is one that `check_config` has passed. `on_worker_ready` is called as each
    worker becomes ready. Setting `hurry` skips draining and every other wait at the end. `stderr`
    takes the processes' logs; None: this process's own. Raises PeerLostError when a process ends
    during the start, UnavailableError when the start takes longer than its timeout. Being
    cancelled while an error is on its way only sets `hurry`; where a process crashes during an
    orderly end, or has to be killed, PeerLostError is raised as well.
    """
    hurry = hurry or asyncio.Event()
    supervisor = Supervisor(hurry=hurry, stderr=stderr)
    lifecycle = _Lifecycle(config, supervisor, on_worker_ready)
    try:
        yield await supervisor.unless_failed(lifecycle.start())
    except JanusError:
        await _to_the_end(lifecycle.end(), hurry)
        raise
    finally:
        try:
            await lifecycle.end()
        finally:
            supervisor.kill_all()
        if supervisor.has_crashed or lifecycle.was_cut_short:
            raise PeerLostError(lifecycle.failure)


class _Lifecycle:
    """Starts and ends the children of one cluster."""

    def __init__(
        self, config: ServeConfig, supervisor: Supervisor, on_worker_ready: OnWorkerReady
    ) -> None:
        self._config = config
        self._supervisor = supervisor
        self._on_worker_ready = on_worker_ready
        self._controller: Child | None = None
        self._endpoint: Child | None = None
        self._is_serving = False
        self._secret = read_secret(config.comm) or ClusterSecret.generate()
        self._missing: dict[int, str] = {}
        """Process id -> name of what is not ready yet."""

    async def start(self) -> Cluster:
        timeout_s = self._config.comm.startup_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                with self._secret.file_for_children() as secret_file:
                    cluster = await self._start(secret_file.fileno())
        except TimeoutError:
            missing = ", ".join(self._missing.values()) or "no process was started yet"
            raise UnavailableError(f"not ready within {timeout_s:g} s: {missing}") from None
        self._is_serving = True
        return cluster

    @property
    def was_cut_short(self) -> bool:
        """Whether the server was ready, and a process did not end in order."""
        children = self._supervisor.children
        return self._is_serving and any(child.was_frozen or child.is_late for child in children)

    @property
    def failure(self) -> str:
        """Who ended first unasked, and who had to be killed: perhaps the cause."""
        supervisor = self._supervisor
        sentences = [supervisor.failure] if supervisor.has_failed else []
        frozen = [child.name for child in supervisor.children if child.was_frozen]
        if frozen:
            sentences.append(
                f"stopped by a signal or a debugger, and killed: the {', the '.join(frozen)}"
            )
        late = [child.name for child in supervisor.children if child.is_late]
        if self._endpoint is not None and supervisor.has_failed and self._endpoint.is_late:
            late.remove(self._endpoint.name)  # it drains, and waits for the others
        if late:
            sentences.append(f"killed, not having ended in time: the {', the '.join(late)}")
        return "; ".join(sentences)

    async def end(self) -> None:
        supervisor = self._supervisor
        supervisor.announce_end()
        if self._endpoint is not None and self._is_serving and not supervisor.has_failed:
            drain_s = self._config.admission.drain_timeout_s
            await supervisor.end([self._endpoint], timeout_s=drain_s + _DRAIN_MARGIN_S)
        others = [child for child in supervisor.children if child is not self._controller]
        await supervisor.end(others, timeout_s=self._stop_timeout_s)
        await supervisor.end(supervisor.children, timeout_s=self._stop_timeout_s)

    @property
    def _stop_timeout_s(self) -> float:
        return _FAILED_STOP_TIMEOUT_S if self._supervisor.has_failed else _STOP_TIMEOUT_S

    async def _start(self, secret_fd: int) -> Cluster:
        config = with_secret_file(self._config, f"/dev/fd/{secret_fd}")
        spawn = functools.partial(self._spawn, secret_fd)
        gpus_free = await _free_gpu_memory() if config.model.device == "cuda" else []
        config = fit_memory(
            config,
            free=free_memory(),
            address_space=free_address_space(),
            gpus_free=gpus_free,
        )
        self._controller = await spawn(
            "controller", "janus_server.controller", to_argv(controller_config(config)), True
        )
        controller = await self._controller.address()
        del self._missing[self._controller.pid]
        for worker in worker_processes(config, controller, num_devices=len(gpus_free) or 1):
            await spawn(worker.name, worker.module, worker.argv)
        self._endpoint = await spawn(
            "endpoint", "janus_server.endpoint", to_argv(endpoint_config(config, controller)), True
        )
        client = ControlClient(controller, self._secret)
        try:
            await self._wait_for_workers(client)
        finally:
            await client.close()
        address = await self._endpoint.address()
        await _wait_until_serving(address)
        return Cluster(
            address=address,
            controller=controller,
            secret=self._secret,
            supervisor=self._supervisor,
        )

    async def _spawn(
        self, secret_fd: int, name: str, module: str, argv: Sequence[str], announces: bool = False
    ) -> Child:
        child = await self._supervisor.spawn(
            name, module, argv, announces=announces, pass_fds=[secret_fd]
        )
        self._missing[child.pid] = child.name
        return child

    async def _wait_for_workers(self, client: ControlClient) -> None:
        async with contextlib.aclosing(client.epochs()) as responses:
            async for response in responses:
                for worker in response.workers:
                    if worker.ready and worker.pid in self._missing:
                        del self._missing[worker.pid]
                        self._on_worker_ready(worker)
                epoch = response.epoch
                members = [*epoch.attention_workers, *epoch.expert_workers]
                if members and all(worker.ready for worker in members):
                    return


async def _to_the_end(work: Coroutine[Any, Any, None], hurry: asyncio.Event) -> None:
    """Await `work`; being cancelled only sets `hurry`."""
    working = asyncio.create_task(work)
    while not working.done():
        try:
            await asyncio.wait([working])
        except asyncio.CancelledError:
            hurry.set()
    working.result()


async def _wait_until_serving(address: str) -> None:
    async with grpc.aio.insecure_channel(address, options=channel_options()) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest()
        while True:
            # A process that ended is noticed as such; its broken connection says less.
            with contextlib.suppress(grpc.aio.AioRpcError):
                response = await stub.Check(request, wait_for_ready=True)
                if response.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            await asyncio.sleep(_HEALTH_POLL_S)


async def _free_gpu_memory() -> list[int]:
    """Free bytes of each GPU; asked in a process of its own, as `janus_server.model.gpu` says."""
    asking = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "janus_server.model.gpu"),
        stdin=DEVNULL,
        stdout=PIPE,
        start_new_session=True,
    )
    try:
        output, _ = await asking.communicate()
    finally:
        if asking.returncode is None:
            asking.kill()
            await asking.wait()
    gpus_free: list[int] = json.loads(output or "[]")
    if not gpus_free:
        raise ConfigError("--device cuda: there is no GPU that PyTorch can use")
    return gpus_free
