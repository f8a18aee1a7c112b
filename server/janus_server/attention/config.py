"""What an attention worker is handed at launch."""

from dataclasses import dataclass, field

from janus_server.comm.config import CommConfig
from janus_server.model.config import ModelConfig
from janus_server.process import ProcessConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Batching and KV cache of each attention worker."""

    max_batch_tokens: int = 2048
    """Tokens fed to the model in one step; longer prompts are prefilled in chunks."""

    max_sequences: int = 64
    """Sequences in one step."""

    max_context: int = 0
    """Longest prompt plus completion, in tokens; 0: what the model was trained for."""

    block_size: int = 16
    """Tokens of a KV block."""

    kv_cache_gib: float = 1.0
    """Memory for KV blocks, in GiB."""

    lanes: int = 1
    """Micro-batches of a step; with 2, one lane's attention runs while the other's experts do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig:
    """Janus attention worker: KV cache, batching, everything dense, sampling."""

    model: ModelConfig
    engine: EngineConfig = field(default_factory=EngineConfig)
    comm: CommConfig = field(default_factory=CommConfig)
    process: ProcessConfig = field(default_factory=ProcessConfig)

    controller: str
    """HOST:PORT of the controller."""

    listen: str = "127.0.0.1:0"
    """HOST:PORT of the worker's gRPC service; port 0 takes a free one."""

    device_index: int = 0
    """Which GPU, with --device cuda."""

    threads: int = 1
    """CPU threads of the worker."""
