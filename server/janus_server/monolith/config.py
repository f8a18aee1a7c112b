"""What a monolithic worker is handed at launch."""

from dataclasses import dataclass

from janus_server.attention.config import AttentionConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class MonolithConfig:
    """Janus worker that holds attention and all experts in one process (--transport local)."""

    attention: AttentionConfig

    expert_workers: int = 1
    """Shares that the experts are split into, as separate expert workers would."""

    @property
    def lifeline(self) -> bool:
        """Whether to exit when standard input closes."""
        return self.attention.lifeline
