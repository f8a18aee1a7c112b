"""The root configuration of `janus serve`: composes the parts that the processes are handed."""

from dataclasses import dataclass, field
from typing import Literal

from janus_server.attention.config import EngineConfig
from janus_server.bounds import Threads
from janus_server.comm.config import CommConfig
from janus_server.controller.config import PoolConfig, ScheduleConfig
from janus_server.endpoint.config import AdmissionConfig
from janus_server.model.config import ModelConfig
from janus_server.telemetry import LogLevel


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """Serve a Mixture-of-Experts checkpoint on this machine.

    Starts one endpoint, one controller and the two pools of workers, prints a line as each worker
    becomes ready and then `ready HOST:PORT`. Ctrl-C, SIGTERM or SIGHUP lets running requests end,
    for a bounded time, and ends all processes; a second one ends them at once.
    """

    model: ModelConfig
    pools: PoolConfig = field(default_factory=PoolConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    comm: CommConfig = field(default_factory=CommConfig)

    transport: Literal["gloo", "local"] = "gloo"
    """How activations travel: gloo between worker processes, or local: attention and all expert
    workers inside one process."""

    threads: Threads = 1
    """CPU threads of each worker process."""

    log_level: LogLevel = "warning"
    """Least severe kind of event that the processes log, on standard error; info: each request."""
