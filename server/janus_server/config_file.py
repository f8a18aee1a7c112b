"""TOML files of flags: one table, whose keys are the fields of a config."""

import difflib
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from janus_server.errors import ConfigError
from janus_server.input_file import read_file

_MAX_BYTES = 2**20

_ACCEPTED: dict[Any, tuple[str, tuple[type, ...]]] = {
    bool: ("true or false", (bool,)),
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
    str: ("a string", (str,)),
}
"""What a field's type is called, and which of TOML's types it takes."""


def read_config_file(path: Path, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Return the file's keys and values; `kinds` are the types of the fields that there are.

    Raises ConfigError.
    """
    content = read_file(path, ConfigError, max_bytes=_MAX_BYTES)
    try:
        table = tomllib.loads(content.decode("utf-8-sig"))  # as editors on Windows write it
    except (ValueError, RecursionError) as error:  # tomllib lets more through than its own error
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    for key, value in table.items():
        if key not in kinds:
            close = difflib.get_close_matches(key, kinds, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{path}: there is no key {key}{hint}")
        expected, fits = _fits(kinds[key], value)
        if not fits:
            raise ConfigError(f"{path}: the key {key} must be {expected}")
        values = value if isinstance(value, list) else [value]
        if any("\0" in text for text in values if isinstance(text, str)):
            raise ConfigError(f"{path}: the key {key} has a NUL character, which no flag can have")
    return table


def element_type(kind: Any) -> Any:
    """The type of a tuple field's elements; None for any other field."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else None


def _fits(kind: Any, value: Any) -> tuple[str, bool]:
    """What values of this type are called, and whether `value` is one."""
    if typing.get_origin(kind) is typing.Literal:
        choices = typing.get_args(kind)
        return f"one of {', '.join(choices)}", value in choices
    element = element_type(kind)
    name, accepted = _ACCEPTED[element or _plain_type(kind)]
    if element:
        fits = isinstance(value, list) and all(type(each) in accepted for each in value)
        return f"a list, and each of its elements {name}", fits
    return name, type(value) in accepted


def _plain_type(kind: Any) -> Any:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return next(member for member in typing.get_args(kind) if member is not types.NoneType)
    return kind
