"""Standard input, output and error, which may be closed, full, or without a reader."""

import io
import logging
import os
import sys

logger = logging.getLogger(__name__)


def open_closed_streams() -> None:
    """Point each standard stream that is closed at the null device.

    Otherwise the next socket that is opened takes its number, and gets what is written to it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115


def write_any_character() -> None:
    """Have characters that the terminal's encoding lacks written as in Python, not fail."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def say(line: str, *, unread: int = logging.WARNING) -> None:
    """Write one line to standard output; where it cannot be written, log it and go on.

    `unread` is the level of that.
    """
    try:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
    except OSError as error:
        _drop_output()
        logger.log(unread, "%s (standard output cannot be written: %s)", line, error.strerror)


def end_output() -> None:
    """Write what standard output holds, or drop it where that fails."""
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()


def _drop_output() -> None:
    """Drop what standard output could not write, and all that follows.

    Otherwise the interpreter's last flush fails as well, and its complaint and status are seen.
    """
    with open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), sys.stdout.fileno())
