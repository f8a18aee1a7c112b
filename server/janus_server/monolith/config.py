"""What a monolithic worker is handed at launch."""

from dataclasses import dataclass

from janus_server.attention.config import AttentionConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class MonolithConfig(AttentionConfig):
    """Janus worker that holds attention and all experts in one process (--transport local)."""

    expert_workers: int = 1
    """Shares that the experts are split into, as separate expert workers would."""
