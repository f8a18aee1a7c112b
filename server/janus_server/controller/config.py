"""What the controller is handed at launch."""

from dataclasses import dataclass, field

from janus_server.comm.config import CommConfig
from janus_server.model.config import ModelConfig
from janus_server.process import ProcessConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolConfig:
    """Worker pools."""

    attention_workers: int = 1
    """Attention workers that an epoch waits for."""

    expert_workers: int = 2
    """Expert workers that an epoch waits for."""

    expert_slots: int = 0
    """Expert slots of each worker and layer; 0: just enough to hold every expert once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ControllerConfig:
    """Janus controller process: membership, epochs, expert placement."""

    model: ModelConfig
    pools: PoolConfig = field(default_factory=PoolConfig)
    comm: CommConfig = field(default_factory=CommConfig)
    process: ProcessConfig = field(default_factory=ProcessConfig)

    listen: str = "127.0.0.1:0"
    """HOST:PORT of the control service; port 0 takes a free one."""
