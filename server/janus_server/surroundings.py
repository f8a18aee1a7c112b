"""What a process finds where it starts, before it imports torch."""

import os
import resource

from janus_server.errors import ConfigError

_MIN_OPEN_FILES = 128
"""A process has one for each connection, and gRPC aborts where it can open none."""
_ENOUGH_OPEN_FILES = 2**16
_MIN_ADDRESS_SPACE = 2 * 2**30
"""Bytes that torch and the threads of gRPC take, before any weight is read."""


def check_surroundings() -> None:
    """Raise the limit of open files, and refuse what no process can work with.

    Raises ConfigError.
    """
    try:
        os.getcwd()
    except OSError:  # libraries that torch loads end the process
        raise ConfigError("the working directory is gone; start from one that exists") from None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _ENOUGH_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH_OPEN_FILES)
    if resource.RLIM_INFINITY != soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    if limit < _MIN_OPEN_FILES:
        raise ConfigError(
            f"a process may open {limit} files here (ulimit -n), fewer than {_MIN_OPEN_FILES}"
        )
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if resource.RLIM_INFINITY != address_space < _MIN_ADDRESS_SPACE:
        raise ConfigError(
            f"a process may address {address_space} bytes here (ulimit -v), fewer than "
            f"{_MIN_ADDRESS_SPACE}"
        )
