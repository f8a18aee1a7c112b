"""Deadlines of the traffic between processes."""

from dataclasses import dataclass

from janus_server.bounds import Seconds

MAX_LANES = 4
"""Micro-batches of a step at most."""

SIGNS_PER_TIMEOUT = 4
"""How often a worker gives a sign of life within the timeout."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CommConfig:
    """Communication."""

    comm_timeout_s: Seconds = 60.0
    """Longest wait for a peer's data within a step before the peer counts as lost, in seconds."""

    startup_timeout_s: Seconds = 600.0
    """Longest wait for all workers to load, meet and become ready, in seconds."""
