"""What an attention worker is handed at launch."""

from dataclasses import dataclass, field
from typing import Annotated

from janus_server.bounds import Between, Threads
from janus_server.comm.config import MAX_BATCH_TOKENS, MAX_LANES, CommConfig
from janus_server.model.config import DeviceIndex, MaxContext, ModelConfig
from janus_server.process import ProcessConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Batching and KV cache of each attention worker."""

    max_batch_tokens: Annotated[int, Between(1, MAX_BATCH_TOKENS)] = 2048
    """Tokens fed to the model in one step; longer prompts are prefilled in chunks."""

    max_sequences: Annotated[int, Between(1, 2**16)] = 64
    """Sequences in one step."""

    max_context: MaxContext = 0
    """Longest prompt plus completion, in tokens; 0: what the model was trained for."""

    block_size: Annotated[int, Between(1, 2**16)] = 16
    """Tokens of a KV block."""

    kv_cache_gib: Annotated[float, Between(0, 2**16)] = 0.0
    """Memory for the KV blocks of each attention worker, in GiB; 0: an equal share of half of what
    all processes leave free on a CPU, of nine tenths on a GPU, where so much can be used. What
    another server has planned for, and not used yet, counts as free: where several share a machine,
    give each a size."""

    lanes: Annotated[int, Between(1, MAX_LANES)] = 1
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

    advertise_host: str = ""
    """Name or address of this machine that peers dial; empty: where the worker listens, but for the
    data plane, and where it listens on every address (0.0.0.0), the address from which it reaches
    the controller."""

    device_index: DeviceIndex = 0
    """Which GPU, with --device cuda."""

    threads: Threads = 1
    """CPU threads of the worker."""
