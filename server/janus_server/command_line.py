"""Frozen config dataclasses <-> command lines and TOML files, one field to one flag to one key.

Nested dataclasses are flattened: a field `max_context` anywhere below the root is the flag
`--max-context` and the TOML key `max_context`. What the command line says wins over the file.
Invariant: `parse(cls, to_argv(config)) == config`.
"""

import dataclasses
import difflib
import inspect
import textwrap
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import tyro

from janus_server.errors import ConfigError

ConfigT = TypeVar("ConfigT")

POSITIONAL_FIELDS = ("checkpoint", "prompt")
"""Fields given by position on a command line rather than by a flag."""

MIN_WAIT_S = 0.001
"""Shortest deadline that can be asked for, in seconds; clocks below count in milliseconds."""
MAX_WAIT_S = 86_400
"""Longest deadline that can be asked for, in seconds: a day."""

_CONFIG_NOTE = (
    "With --config FILE.toml, flags are read from a TOML file, where the flag --max-context is "
    "the key max_context. A flag on the command line wins over the file."
)
_HELP_WIDTH = 78


class Command(Protocol):
    """A sub-command of `janus`; the first line of its docstring is its summary."""

    def __call__(self, argv: Sequence[str]) -> int:
        """Run with the arguments after the sub-command's name and return the exit status."""
        ...


def parse(cls: type[ConfigT], argv: Sequence[str], *, prog: str) -> ConfigT:
    """Build `cls` from flags, over the keys of the TOML file named by `--config`.

    Prints help or one complaint and raises SystemExit where the flags are wrong; raises ConfigError
    where the file cannot be used.
    """
    paths, argv = _split_off_config_files(argv)
    table: dict[str, Any] = {}
    for path in paths:
        table |= _read_toml(path, cls)
    positional = {key: value for key, value in table.items() if key in POSITIONAL_FIELDS}
    flags = [
        argument
        for key, value in table.items()
        if key not in POSITIONAL_FIELDS
        for argument in _flag(key, value)
    ]
    # A default, unlike an argument, makes room for the one on the command line.
    default: Any = _with_defaults(cls, positional) if positional else None
    config: ConfigT = tyro.cli(
        cls,
        args=[*flags, *argv],
        prog=prog,
        description=_description(cls),
        default=default,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    return config


def to_argv(config: Any) -> list[str]:
    """Write a config as the command line that `parse` reads back."""
    positional: list[str] = []
    flags: list[str] = []
    for name, value in _leaves(config):
        if name not in POSITIONAL_FIELDS:
            flags += _flag(name, value)
        elif value is not None:
            positional.append(str(value))
    if any(value.startswith("-") for value in positional):
        positional.insert(0, "--")
    return flags + positional


def check_number(flag: str, value: float, *, low: float, high: float) -> None:
    """Refuse a number that is not from `low` to `high`, nan included; raises ConfigError."""
    if not value >= low:
        raise ConfigError(f"--{flag} must be at least {low}, not {value}")
    if value > high:
        raise ConfigError(f"--{flag} must be at most {high}, not {value}")


def check_wait(flag: str, value_s: float, *, low_s: float = MIN_WAIT_S) -> None:
    """Refuse a number of seconds that no clock can wait for; raises ConfigError."""
    check_number(flag, value_s, low=low_s, high=MAX_WAIT_S)


def _flag(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if value is None or value is False:
        return []
    # One argument, so that a value may begin with a dash.
    return [flag] if value is True else [f"{flag}={value}"]


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


def _read_toml(path: Path, cls: type[Any]) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # tomllib lets more through than its own error
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    types = dict(_leaf_types(cls))
    for key, value in table.items():
        if key not in types:
            close = difflib.get_close_matches(key, types, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{path}: there is no key {key}{hint}")
        if isinstance(value, dict | list):
            raise ConfigError(f"{path}: the key {key} must be a plain value, not a table or list")
        if isinstance(value, bool) != (types[key] is bool):
            must = "must be true or false" if types[key] is bool else "cannot be true or false"
            raise ConfigError(f"{path}: the key {key} {must}")
        if key in POSITIONAL_FIELDS and not isinstance(value, str):
            raise ConfigError(f"{path}: the key {key} must be a string")
    return table
