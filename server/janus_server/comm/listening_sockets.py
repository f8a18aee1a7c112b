"""Listening sockets that a library opens and never closes: find them, and close the door.

Gloo goes on accepting when all peers have come, keeps each connection for good, and ends the
process when there is no file descriptor left.
"""

import ctypes
import logging
import os
import socket
import stat
import struct

logger = logging.getLogger(__name__)

_SO_ATTACH_FILTER = 26
"""Linux' asm-generic/socket.h; Python has no name for it."""
_KEEP_NOTHING = struct.pack("=HBBI", 0x06, 0, 0, 0)
"""The classic BPF instruction "return 0": of each packet, 0 bytes are kept (linux/filter.h)."""


def listening_sockets() -> set[tuple[int, int]]:
    """What listens for connections in this process: file descriptor and inode of each socket."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            copy = os.dup(int(name))
        except OSError:  # closed meanwhile, by another thread
            continue
        status = os.fstat(copy)
        if not stat.S_ISSOCK(status.st_mode):
            os.close(copy)
            continue
        with socket.socket(fileno=copy) as opened:
            if opened.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                found.add((int(name), status.st_ino))
    return found


def admit_no_more(descriptor: int) -> None:
    """Drop all packets of new connections to a listening socket; those that there are stay.

    Its owner notices nothing, as it would if the socket were closed.
    """
    instruction = ctypes.create_string_buffer(_KEEP_NOTHING, len(_KEEP_NOTHING))
    program = struct.pack("@HP", 1, ctypes.addressof(instruction))
    try:
        with socket.socket(fileno=os.dup(descriptor)) as listener:
            listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
    except OSError as error:  # some sandboxes have no socket filters
        logger.warning("cannot close a port whose connections have all come: %s", error)
