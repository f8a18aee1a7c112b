"""Errors that cross a process or API boundary; each carries one sentence that a user can act on."""

import re


class JanusError(Exception):
    """Base of what is reported as a sentence, never as a traceback.

    The sentence is one line, whatever names of files or keys it quotes.
    """

    def __str__(self) -> str:
        """The sentence, in which line ends and terminal codes are written as in Python."""
        return "".join(
            char if char.isprintable() else char.encode("unicode_escape").decode()
            for char in super().__str__()
        )


def sentence_of(error: BaseException) -> str | None:
    """What a user is told of an error of Janus or of the system; None for a fault of the code."""
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(sentence_of, error.exceptions)), None)
    if isinstance(error, JanusError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename!r}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return "there is no memory left"
    if isinstance(error, RuntimeError) and str(error) == "can't start new thread":
        return "no thread can be started: see the limits of the system (ulimit -u and -v)"
    # As torch says for memory of a CPU and of a GPU.
    asked = re.search(r"ried to allocate ([\d.]+ \w+)", str(error))
    if isinstance(error, RuntimeError) and asked:
        return f"there is no memory left for {asked[1]} more (see also ulimit -v)"
    return None


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
