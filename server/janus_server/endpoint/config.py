"""What the endpoint is handed at launch."""

from dataclasses import dataclass, field
from typing import Annotated

from janus_server.bounds import Between, Seconds
from janus_server.comm.config import CommConfig
from janus_server.model.config import MaxContext, ModelConfig
from janus_server.process import ProcessConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class AdmissionConfig:
    """Public endpoint."""

    listen: str = "127.0.0.1:50051"
    """HOST:PORT of the public gRPC service; port 0 takes a free one."""

    max_requests: Annotated[int, Between(1, 2**20)] = 256
    """Requests in the system, running and queued; one more is refused with RESOURCE_EXHAUSTED."""

    drain_timeout_s: Annotated[float, Between(0, 86_400)] = 30.0
    """On shutdown, how long running requests may still take, in seconds."""

    client_stall_timeout_s: Seconds = 30.0
    """A stream whose client takes no message for this long is cut, in seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EndpointConfig:
    """Janus endpoint process: public API, tokenizer, admission."""

    model: ModelConfig
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    comm: CommConfig = field(default_factory=CommConfig)
    process: ProcessConfig = field(default_factory=ProcessConfig)

    controller: str
    """HOST:PORT of the controller."""

    max_context: MaxContext = 0
    """Longest prompt plus completion, in tokens, where no attention worker has less; 0: what the
    model was trained for."""
