"""The shell of every Janus process: config, log, event loop, signals, lifeline, exit status.

Invariant: what asks for an end sets the `stop` event and does nothing else: the lifeline where a
process has one (`lifeline.py`), else SIGTERM, SIGINT and SIGHUP.
"""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol, TypeVar

import uvloop

from janus_server import command_line
from janus_server.errors import JanusError, sentence_of
from janus_server.lifeline import Lifeline
from janus_server.standard_streams import open_closed_streams, say
from janus_server.surroundings import check_surroundings
from janus_server.telemetry import LogLevel, configure_logging

logger = logging.getLogger(__name__)

STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
"""The signals that ask for an end."""

_ANNOUNCEMENT = "listening "


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessConfig:
    """Process."""

    log_level: LogLevel = "info"
    """Least severe kind of event that is logged."""

    lifeline: bool = False
    """Exit when standard input closes, or the parent says so on it; leave signals to the parent."""


class _HasProcessConfig(Protocol):
    @property
    def process(self) -> ProcessConfig: ...


ConfigT = TypeVar("ConfigT", bound=_HasProcessConfig)


def run(
    name: str,
    cls: type[ConfigT],
    main: Callable[[ConfigT, asyncio.Event], Awaitable[None]],
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Parse `cls` from the command line, run `main(config, stop)` until it returns, and exit.

    `main` must return soon after `stop` is set. The exit status is 0, or 1 after a JanusError
    or a complaint of the system, which is logged without a traceback; any other exception passes.
    """
    open_closed_streams()
    configure_logging(name)
    status = 1
    try:
        check_surroundings()
        prog = f"python -m janus_server.{name}"
        config = command_line.parse(cls, sys.argv[1:] if argv is None else argv, prog=prog)
        configure_logging(name, config.process.log_level)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_run_until_stopped(config, main))
        status = 0
    except (JanusError, OSError, MemoryError, RuntimeError, BaseExceptionGroup) as error:
        sentence = sentence_of(error)
        if sentence is None:
            raise
        logger.error("%s", sentence)
    # The interpreter's own exit would abort, with a core dump, on a thread that is inside C++.
    logging.shutdown()
    os._exit(status)


def announce(address: str, config: ProcessConfig) -> None:
    """Tell the parent, by one line on standard output, the HOST:PORT that was really bound."""
    # A parent that reads no more has ended, and the lifeline says so.
    say(f"{_ANNOUNCEMENT}{address}", unread=logging.DEBUG if config.lifeline else logging.WARNING)


def announced_address(line: str) -> str | None:
    """Return the HOST:PORT in a line written by `announce`; None for any other line."""
    if not line.startswith(_ANNOUNCEMENT):
        return None
    return line.removeprefix(_ANNOUNCEMENT).strip()


def on_stop_signals(handler: Callable[[signal.Signals], None]) -> None:
    """Have the running event loop call `handler` with each signal that asks for an end."""
    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        # Whoever starts a process with nohup wants it to go on without its terminal.
        if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
            continue
        loop.add_signal_handler(number, handler, number)


async def _run_until_stopped(
    config: ConfigT, main: Callable[[ConfigT, asyncio.Event], Awaitable[None]]
) -> None:
    stop = asyncio.Event()
    if config.process.lifeline:
        on_stop_signals(Lifeline(stop).leave_to_parent)
    else:
        on_stop_signals(lambda number: stop.set())
    await main(config, stop)
