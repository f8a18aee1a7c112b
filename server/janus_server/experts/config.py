"""What an expert worker is handed at launch."""

from dataclasses import dataclass, field

from janus_server.comm.config import CommConfig
from janus_server.model.config import ModelConfig
from janus_server.process import ProcessConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertConfig:
    """Janus expert worker: gates and expert slots; holds no request state."""

    model: ModelConfig
    comm: CommConfig = field(default_factory=CommConfig)
    process: ProcessConfig = field(default_factory=ProcessConfig)

    controller: str
    """HOST:PORT of the controller."""

    device_index: int = 0
    """Which GPU, with --device cuda."""

    threads: int = 1
    """CPU threads of the worker."""
