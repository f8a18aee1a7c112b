"""glibc's memory allocator, which can be told what to keep; other C libraries are left alone."""

import ctypes
import sys


def glibc() -> ctypes.CDLL | None:
    """The C library of this process, if it is glibc."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") else None  # musl


def give_back_freed_memory() -> None:
    """Return to the system what is kept for later: after a large use that leaves gaps."""
    libc = glibc()
    if libc is not None:
        libc.malloc_trim(0)
