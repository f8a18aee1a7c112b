"""The sockets of this process, whoever opened them; other threads may close them at any time."""

import contextlib
import os
import socket


def own_sockets() -> dict[str, int]:
    """The kernel's name of each socket, which no other gets -> file descriptor."""
    sockets = {}
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            name = os.readlink(f"/proc/self/fd/{descriptor}")
            if name.startswith("socket:"):
                sockets[name] = int(descriptor)
    return sockets


def duplicate(descriptor: int) -> socket.socket:
    """A socket by a second descriptor, to be closed; raises OSError where it is none any more."""
    copy = os.dup(descriptor)
    try:
        return socket.socket(fileno=copy)
    except OSError:  # the number is another file's now
        os.close(copy)
        raise
