"""What a monolithic worker is handed at launch."""

from dataclasses import dataclass, field

from janus_server.attention.config import AttentionConfig
from janus_server.controller.config import PoolConfig, ScheduleConfig
from janus_server.process import ProcessConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class MonolithConfig:
    """Janus worker that holds attention and all experts in one process (--transport local)."""

    attention: AttentionConfig

    pools: PoolConfig = field(default_factory=PoolConfig)
    """The experts are split as separate expert workers would split them."""

    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    @property
    def process(self) -> ProcessConfig:
        """What every process has."""
        return self.attention.process
