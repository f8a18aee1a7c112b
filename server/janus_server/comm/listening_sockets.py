"""Listening sockets that a library opens and never closes: find them, and close the door.

Gloo goes on accepting when all peers have come, keeps each connection for good, and ends the
process when there is no file descriptor left.
"""

import ctypes
import logging
import socket
import struct

from janus_server.own_sockets import duplicate, own_sockets

logger = logging.getLogger(__name__)

_SO_ATTACH_FILTER = 26
"""Linux' asm-generic/socket.h; Python has no name for it."""
_KEEP_NOTHING = struct.pack("=HBBI", 0x06, 0, 0, 0)
"""The classic BPF instruction "return 0": of each packet, 0 bytes are kept (linux/filter.h)."""


def listening_sockets() -> dict[str, int]:
    """What listens for connections in this process, as `own_sockets` returns it."""
    return {name: fd for name, fd in own_sockets().items() if _is_listening(fd)}


def admit_no_more(descriptor: int) -> None:
    """Drop all packets of new connections to a listening socket; those that there are stay.

    Its owner notices nothing, as it would if the socket were closed.
    """
    instruction = ctypes.create_string_buffer(_KEEP_NOTHING, len(_KEEP_NOTHING))
    program = struct.pack("@HP", 1, ctypes.addressof(instruction))
    try:
        with duplicate(descriptor) as listener:
            listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
    except OSError as error:  # some sandboxes have no socket filters
        logger.warning("cannot close a port whose connections have all come: %s", error)


def _is_listening(descriptor: int) -> bool:
    try:
        with duplicate(descriptor) as copy:
            return bool(copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:  # closed meanwhile
        return False
