"""What a process finds where it starts, before it imports torch."""

import _thread
import contextlib
import os
import resource
import threading

from janus_server.errors import ConfigError

_MIN_OPEN_FILES = 128
"""A process has one for each connection, and gRPC aborts where it can open none."""
_ENOUGH_OPEN_FILES = 2**16
_MIN_ADDRESS_SPACE = 2 * 2**30
"""Bytes that torch and the threads of gRPC take, before any weight is read."""
_PROBE_STACK_BYTES = 256 * 2**10
"""A thread that only waits needs little; torch keeps some of it for variables of threads."""


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
    check_threads("a process runs", _fewest_threads())


def threads_of_process(computing: int = 0) -> int:
    """How many threads a process runs at most, about, where `computing` of them compute."""
    # OpenBLAS has one for each CPU as soon as NumPy is imported.
    return _fewest_threads() + min(_num_cpus(), 64) + 2 * computing


def check_threads(who: str, num_threads: int) -> None:
    """Refuse where the system lets fewer threads be started; raises ConfigError.

    They are started for that: the limits count other processes of the user or container too. gRPC
    aborts where it can start none. `who` begins the sentence.
    """
    num_started = _start_threads(num_threads)
    if num_started < num_threads:
        raise ConfigError(
            f"{who} up to {num_threads} threads, and only {num_started} more can be started here "
            "(ulimit -u, or pids.max of the cgroup)"
        )


def _fewest_threads() -> int:
    """Of gRPC, whose pool grows with the CPUs, of the event loop, and of work beside it."""
    return 10 + min(max(_num_cpus(), 4), 16)


def _num_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _start_threads(num_threads: int) -> int:
    """Start so many threads and end them; returns how many could be started."""
    end = threading.Lock()

    def wait() -> None:
        with end:
            pass

    stack_bytes = threading.stack_size(_PROBE_STACK_BYTES)
    num_started = 0
    try:
        with end, contextlib.suppress(RuntimeError):
            while num_started < num_threads:
                # Objects of `threading` wait for each other, which takes 50 times as long.
                _thread.start_new_thread(wait, ())
                num_started += 1
    finally:
        threading.stack_size(stack_bytes)
    return num_started
