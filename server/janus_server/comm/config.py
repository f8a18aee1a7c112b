"""Deadlines and the secret of the traffic between processes."""

from dataclasses import dataclass

from janus_server.bounds import Seconds

MAX_BATCH_TOKENS = 2**20
"""Tokens of an attention worker's step at most."""

MAX_LANES = 4
"""Micro-batches of a step at most."""

SIGNS_PER_TIMEOUT = 4
"""How often a worker gives a sign of life within the timeout."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CommConfig:
    """Communication."""

    comm_timeout_s: Seconds = 60.0
    """Longest wait for a peer's data within a step before the peer counts as lost, in seconds; the
    same for all processes of a cluster."""

    cluster_secret_file: str = ""
    """File with the secret that all processes of a cluster show each other; users other than its
    owner and group must not be able to read it. Empty: `janus serve` makes a secret for each run;
    a process started by hand has none, and then listens on loopback alone."""

    startup_timeout_s: Seconds = 600.0
    """Longest wait for all workers to load, meet and become ready, in seconds."""
