"""Errors that cross a process or API boundary; each carries one sentence that a user can act on."""


class JanusError(Exception):
    """Base of what is reported as a sentence, never as a traceback."""


class CheckpointError(JanusError):
    """The checkpoint is missing, broken, or of a family that is not served."""


class ConfigError(JanusError):
    """A flag or key of the configuration is wrong, or contradicts another."""


class InvalidRequestError(JanusError):
    """A request is out of bounds (gRPC INVALID_ARGUMENT)."""


class DuplicateRequestError(JanusError):
    """A running request has the id already (gRPC ALREADY_EXISTS)."""


class OverloadedError(JanusError):
    """The bounded queue is full (gRPC RESOURCE_EXHAUSTED)."""


class UnavailableError(JanusError):
    """The part that should answer is not there, not ready or shutting down (gRPC UNAVAILABLE)."""


class StalledClientError(JanusError):
    """The client does not take its messages (gRPC ABORTED)."""


class RequestFailedError(JanusError):
    """A fault of the server ended a request; others go on (gRPC INTERNAL)."""


class PeerLostError(JanusError):
    """A worker of the epoch died or stayed silent past its deadline."""
