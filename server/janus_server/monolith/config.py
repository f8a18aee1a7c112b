"""What a monolithic worker is handed at launch."""

from dataclasses import dataclass

from janus_server.attention.config import AttentionConfig
from janus_server.process import ProcessConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class MonolithConfig:
    """Janus worker that holds attention and all experts in one process (--transport local)."""

    attention: AttentionConfig

    expert_workers: int = 1
    """Shares that the experts are split into, as separate expert workers would."""

    @property
    def process(self) -> ProcessConfig:
        """What every process has."""
        return self.attention.process
