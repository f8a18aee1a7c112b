"""What an expert worker is handed at launch."""

from dataclasses import dataclass, field

from janus_server.bounds import Threads
from janus_server.comm.config import CommConfig
from janus_server.model.config import DeviceIndex, ModelConfig
from janus_server.process import ProcessConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertConfig:
    """Janus expert worker: gates and expert slots; holds no request state."""

    model: ModelConfig
    comm: CommConfig = field(default_factory=CommConfig)
    process: ProcessConfig = field(default_factory=ProcessConfig)

    controller: str
    """HOST:PORT of the controller."""

    advertise_host: str = ""
    """Name or address of this machine that peers dial; empty: the address from which the worker
    reaches the controller."""

    device_index: DeviceIndex = 0
    """Which GPU, with --device cuda."""

    threads: Threads = 1
    """CPU threads of the worker."""
