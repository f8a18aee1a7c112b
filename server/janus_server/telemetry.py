"""Logging for every process: one line an event on standard error, one format."""

import logging
import sys


def configure_logging(process: str, level: str = "INFO") -> None:
    """Send the log of this process, named `process` in each line, to standard error."""
    logging.basicConfig(
        stream=sys.stderr,
        level=level,
        format=f"%(asctime)s %(levelname)s {process} %(name)s: %(message)s",
        force=True,
    )
