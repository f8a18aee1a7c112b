"""Read the small files that an operator names or a checkpoint brings, none of which is trusted.

A FIFO would block its reader for ever, a device would never end, and a huge file would fill the
memory: only regular files of bounded size are read.
"""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from janus_server.errors import JanusError

_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "directory"),
    (stat.S_ISFIFO, "pipe (FIFO)"),
    (stat.S_ISSOCK, "socket"),
)
_MAX_JSON_BYTES = 2**26
"""Several times the index of the largest model that is known."""


def is_there(path: Path) -> bool:
    """Whether anything has this name; a link that leads nowhere too, so that it is noticed."""
    return os.path.lexists(path)


def check_regular(path: Path, error: type[JanusError]) -> None:
    """Raise `error`, with a sentence, where `path` is no regular file or link to one."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as failure:
        raise error(f"cannot read {path}: {_reason(failure)}") from None
    _check_kind(path, status, error)


def read_file(path: Path, error: type[JanusError], *, max_bytes: int) -> bytes:
    """All of a regular file; raises `error`, with a sentence, where it cannot be read."""
    check_regular(path, error)  # to open some devices is to use them
    try:
        # Without O_NONBLOCK, a FIFO that took the file's place would block the call.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            _check_kind(path, os.fstat(file.fileno()), error)
            content = file.read(max_bytes + 1)
    except (OSError, ValueError) as failure:
        raise error(f"cannot read {path}: {_reason(failure)}") from None
    if len(content) > max_bytes:
        raise error(f"{path} is larger than the {max_bytes >> 20} MiB that are read of such a file")
    return content


def read_json(path: Path, error: type[JanusError]) -> Any:
    """The value in a JSON file; raises `error`, with a sentence, where there is none.

    A key that an object has twice is refused: readers differ in which of the two they take.
    """
    content = read_file(path, error, max_bytes=_MAX_JSON_BYTES)
    try:
        return json.loads(content.decode(), object_pairs_hook=_object)
    except (ValueError, RecursionError) as failure:
        raise error(f"{path} is not valid JSON: {failure}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {json.dumps(twice)} stands twice in one object")
    return value


def _check_kind(path: Path, status: os.stat_result, error: type[JanusError]) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(status.st_mode)), "device")
        raise error(f"{path} is a {kind}, not a regular file")


def _reason(failure: OSError | ValueError) -> str:
    return (failure.strerror if isinstance(failure, OSError) else None) or str(failure)
