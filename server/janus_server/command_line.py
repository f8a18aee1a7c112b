"""Frozen config dataclasses <-> command lines and TOML files, one field to one flag to one key.

Nested dataclasses are flattened: a field `max_context` anywhere below the root is the flag
`--max-context` and the TOML key `max_context`. What the command line says wins over the file.
Invariant: `parse(cls, to_argv(config)) == config` for a config whose numbers are within bounds.
"""

import dataclasses
import inspect
import os
import re
import shutil
import textwrap
import typing
from collections import deque
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import tyro

from janus_server.bounds import Between
from janus_server.config_file import element_type, read_config_file
from janus_server.errors import ConfigError

ConfigT = TypeVar("ConfigT")

_CONFIG_NOTE = (
    "With --config FILE.toml, flags are read from a TOML file, where the flag --max-context is "
    "the key max_context. A flag on the command line wins over the file."
)
_HELP_WIDTH = 78
_MIN_COLUMNS = 20
"""tyro lays text out for ever on fewer than five."""
_FLAG = re.compile("-(-|[a-zA-Z])")


class Command(Protocol):
    """A sub-command of `janus`; the first line of its docstring is its summary."""

    def __call__(self, argv: Sequence[str]) -> int:
        """Run with the arguments after the sub-command's name and return the exit status."""
        ...


def parse(cls: type[ConfigT], argv: Sequence[str], *, prog: str) -> ConfigT:
    """Build `cls` from flags, over the keys of the TOML file named by `--config`.

    Prints help or one complaint and raises SystemExit where the flags are wrong; raises ConfigError
    where the file cannot be used or a number is out of its bounds.
    """
    kinds = dict(_leaf_types(cls))
    positional = set(_positional_fields(cls))
    paths, argv = _split_off_config_files(argv)
    table: dict[str, Any] = {}
    for path in paths:
        table |= read_config_file(path, kinds)
    tuples, argv = _split_off_tuples(kinds, positional, argv)
    table |= tuples
    # A default, unlike an argument, makes room for the one on the command line.
    defaults = {
        key: _elements(key, element_type(kinds[key]), value) if isinstance(value, list) else value
        for key, value in table.items()
        if key in positional or isinstance(value, list)
    }
    flags = [
        argument
        for key, value in table.items()
        if key not in defaults
        for argument in _flag(key, value)
    ]
    default: Any = _with_defaults(cls, defaults) if defaults else None
    if shutil.get_terminal_size().columns < _MIN_COLUMNS:
        os.environ["COLUMNS"] = str(_MIN_COLUMNS)  # tyro takes no width but that of the terminal
    config: ConfigT = tyro.cli(
        cls,
        args=[*flags, *argv],
        prog=prog,
        description=_description(cls),
        default=default,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    _check_numbers(config)
    return config


def to_argv(config: Any) -> list[str]:
    """Write a config as the command line that `parse` reads back; flags may follow it."""
    by_position = set(_positional_fields(type(config)))
    positional: list[str] = []
    flags: list[str] = []
    for name, value in _leaves(config):
        if name not in by_position:
            flags += _flag(name, value)
        else:
            positional.append(value)
    if any(value.startswith("-") for value in positional):
        return [*flags, "--", *positional]
    # A flag of an empty tuple would take what follows it.
    return [*positional, *flags]


def _flag(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, tuple):
        return [f"--{flag}={element}" for element in value] or [f"--{flag}"]
    # One argument, so that a value may begin with a dash.
    return [f"--{flag}={value}"]


def _leaves(config: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value)
        else:
            yield field.name, value


def _leaf_types(cls: Any) -> Iterator[tuple[str, Any]]:
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            yield from _leaf_types(kind)
        else:
            yield name, kind


def _positional_fields(cls: Any) -> Iterator[str]:
    """Names of the fields that are given by position rather than by a flag."""
    for name, kind in typing.get_type_hints(cls, include_extras=True).items():
        if dataclasses.is_dataclass(kind):
            yield from _positional_fields(kind)
        elif tyro.conf.Positional in getattr(kind, "__metadata__", ()):
            yield name


def _with_defaults(cls: Any, values: Mapping[str, Any]) -> Any:
    """Build `cls` with these leaves set, its own defaults, and tyro's MISSING for what has none."""
    arguments: dict[str, Any] = {}
    types = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        has_default = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
        if dataclasses.is_dataclass(types[field.name]):
            arguments[field.name] = _with_defaults(types[field.name], values)
        elif field.name in values:
            arguments[field.name] = values[field.name]
        elif not has_default:
            arguments[field.name] = tyro.MISSING
    return cls(**arguments)


def _description(cls: type[Any]) -> str:
    paragraphs = f"{inspect.getdoc(cls)}\n\n{_CONFIG_NOTE}".split("\n\n")
    # tyro joins lines into one unwrapped line a paragraph unless they begin with a space.
    return "\n\n".join(
        textwrap.fill(paragraph, _HELP_WIDTH, initial_indent="  ", subsequent_indent="  ")
        for paragraph in paragraphs
    )


def _split_off_config_files(argv: Sequence[str]) -> tuple[list[Path], list[str]]:
    paths: list[Path] = []
    rest: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--":
            rest += [argument, *arguments]
        elif argument == "--config":
            path = next(arguments, None)
            if path is None:
                raise ConfigError("--config needs the path of a TOML file")
            paths.append(Path(path))
        elif argument.startswith("--config="):
            paths.append(Path(argument.removeprefix("--config=")))
        else:
            rest.append(argument)
    return paths, rest


def _split_off_tuples(
    kinds: Mapping[str, Any], positional: Container[str], argv: Sequence[str]
) -> tuple[dict[str, list[str]], list[str]]:
    """Split off the fields of many values: `--stop a b`, or `--stop=a --stop=b`; alone: none.

    tyro would keep the last such flag only, and takes no value after the first for a value that
    begins with a dash.
    """
    found: dict[str, list[str]] = {}
    rest: list[str] = []
    arguments = deque(argv)
    while arguments:
        argument = arguments.popleft()
        flag, equals, value = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if argument == "--":
            rest += [argument, *arguments]
            break
        if flag.startswith("--") and name in positional:
            raise ConfigError(f"{flag} is no flag: the {name} is given without one")
        if not (flag.startswith("--") and element_type(kinds.get(name))):
            rest.append(argument)
            continue
        values = found.setdefault(name, [])
        if equals:
            values.append(value)
        while not equals and arguments and not _FLAG.match(arguments[0]):
            values.append(arguments.popleft())
    return found, rest


def _elements(name: str, element: type, values: Sequence[Any]) -> tuple[Any, ...]:
    try:
        return tuple(element(value) for value in values)
    except (ValueError, OverflowError):
        flag = name.replace("_", "-")
        raise ConfigError(f"--{flag} must be numbers, not {' '.join(map(str, values))}") from None


def _check_numbers(config: Any) -> None:
    for name, kind in typing.get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            _check_numbers(value)
        for bounds in getattr(kind, "__metadata__", ()):
            if isinstance(bounds, Between):
                bounds.check(name.replace("_", "-"), value)
