"""What the controller is handed at launch."""

from dataclasses import dataclass, field
from typing import Annotated

from janus_scheduler.activation import SchedulePolicy
from janus_server.bounds import Between
from janus_server.comm.config import CommConfig
from janus_server.model.config import ModelConfig
from janus_server.process import ProcessConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolConfig:
    """Worker pools."""

    attention_workers: Annotated[int, Between(1, 1024)] = 1
    """Attention workers that an epoch waits for."""

    expert_workers: Annotated[int, Between(0, 1024)] = 2
    """Expert workers that an epoch waits for."""

    expert_slots: Annotated[int, Between(0, 2**16)] = 0
    """Expert slots of each worker and layer; 0: just enough to hold every expert once."""

    placement: str = ""
    """JSON file that `janus placement --output` wrote, for as many expert workers; empty: experts
    and replicas are dealt out in turn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Choice of replicas."""

    schedule: SchedulePolicy = "auto"
    """How each batch's activated experts choose among their replicas: auto weighs exact, which has
    the slowest worker read fewest experts, against token, which spreads tokens; the others are
    there to compare."""

    expert_us: Annotated[float, Between(0, 1e6)] = 0.0
    """Time to read one more expert's weights, in microseconds, that auto weighs; 0: each expert
    worker measures itself at its start and the slowest counts."""

    pair_us: Annotated[float, Between(0, 1e6)] = 0.0
    """Time to compute one more token-expert pair, in microseconds, given together with the time of
    an expert; 0: measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ControllerConfig:
    """Janus controller process: membership, epochs, expert placement."""

    model: ModelConfig
    pools: PoolConfig = field(default_factory=PoolConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    comm: CommConfig = field(default_factory=CommConfig)
    process: ProcessConfig = field(default_factory=ProcessConfig)

    listen: str = "127.0.0.1:0"
    """HOST:PORT of the control service; port 0 takes a free one."""

    advertise_host: str = ""
    """Name or address of this machine that workers dial; empty: where the controller listens, or,
    where that is every address (0.0.0.0), where each worker reaches the controller."""
