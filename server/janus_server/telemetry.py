"""Logging for every process: one line an event on standard error, one format."""

import logging
import sys
from typing import Literal

LogLevel = Literal["debug", "info", "warning", "error"]
"""Least severe kind of event that is logged."""


def configure_logging(process: str, level: LogLevel = "info") -> None:
    """Send the log of this process, named `process` in each line, to standard error."""
    logging.basicConfig(
        stream=sys.stderr,
        level=level.upper(),
        format=f"%(asctime)s %(levelname)s {process} %(name)s: %(message)s",
        force=True,
    )
    logging.getLogger("grpc._cython.cygrpc").addFilter(is_no_header)


def is_no_header(record: logging.LogRecord) -> bool:
    """Leave out what gRPC logs, with a traceback, of each header that is not UTF-8.

    Any client can send such headers as often as it likes.
    """
    return not str(record.msg).startswith("Invalid encoding")
