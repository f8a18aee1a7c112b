"""The `janus` command: finds its sub-commands by name, runs one, turns errors into sentences.

Modules that take time to import are imported inside `run`, where Ctrl-C is handled.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from janus_server.errors import JanusError, sentence_of
from janus_server.standard_streams import end_output, open_closed_streams, write_any_character
from janus_server.surroundings import check_surroundings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from importlib.metadata import EntryPoint

    from janus_server.command_line import Command

_GROUP = "janus.commands"

_EXIT_ERROR = 1
_EXIT_USAGE = 2
_EXIT_INTERRUPTED = 128 + 2

_INTRODUCTION = """\
usage: janus COMMAND [ARGUMENTS]

Janus serves Mixture-of-Experts language models with the attention layers and the expert
layers in separate worker processes, so that each side can be scaled on its own. It reads
Hugging Face checkpoints and answers over gRPC.

commands:
"""

_FIRST_STEPS = """
first steps:
  janus demo                                   see it work on a small bundled model
  janus serve PATH_TO_CHECKPOINT               serve a model on 127.0.0.1:50051
  janus generate "Once upon a time"            stream text from it, in another terminal

`janus COMMAND --help` explains a command's arguments; `janus --version` prints the version.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `janus` with these arguments (default: the process's own); returns the exit status."""
    return run("janus", _run, argv)


def run(name: str, command: Command, argv: Sequence[str] | None = None) -> int:
    """Run a command and turn its errors into sentences of `name`; returns the exit status."""
    open_closed_streams()
    write_any_character()
    try:
        check_surroundings()
        status = command(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader left
        end_output()
        return _EXIT_ERROR
    except (JanusError, OSError, MemoryError, RuntimeError, BaseExceptionGroup) as error:
        sentence = sentence_of(error)
        if sentence is None:
            raise
        print(f"{name}: {sentence}", file=sys.stderr)
        end_output()
        return _EXIT_ERROR


def summarize(name: str, command: Command) -> str:
    """One line of the list of commands: the name and the first line of the docstring."""
    summary = (command.__doc__ or "").strip().partition("\n")[0]
    return f"  {name:<12}{summary}"


def _run(argv: Sequence[str]) -> int:
    import importlib.metadata

    commands = {entry.name: entry for entry in importlib.metadata.entry_points(group=_GROUP)}
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help(commands), end="")
        return 0 if argv else _EXIT_USAGE
    if argv[0] == "--version":
        print(f"janus {importlib.metadata.version('janus-moe')}")
        return 0
    name, *rest = argv
    if name not in commands:
        return _complain_about(name, commands)
    return _load(commands[name])(rest)


def _help(commands: Mapping[str, EntryPoint]) -> str:
    lines = []
    for name, entry in sorted(commands.items()):
        with contextlib.suppress(JanusError):
            lines.append(summarize(name, _load(entry)))
    return _INTRODUCTION + "\n".join(lines) + "\n" + _FIRST_STEPS


def _load(entry: EntryPoint) -> Command:
    try:
        command: Command = entry.load()
    except ModuleNotFoundError as error:
        raise JanusError(
            f"`janus {entry.name}` needs the Python package {error.name}, which is not installed"
        ) from None
    return command


def _complain_about(name: str, commands: Mapping[str, EntryPoint]) -> int:
    import difflib

    close = difflib.get_close_matches(name, commands, n=1)
    hint = f"did you mean `janus {close[0]}`?" if close else "`janus --help` lists them."
    print(f"janus: there is no command {name!r}; {hint}", file=sys.stderr)
    return _EXIT_USAGE
