"""JSON files of a checkpoint: each value is checked for type and range before it is used.

A key that is absent and one that is null mean the same: the default, or where there is none, that
the file cannot be used. Every complaint is a KeyError (the key is missing) or a ValueError.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from janus_server.errors import CheckpointError
from janus_server.input_file import read_json

MAX_SIZE = 2**31 - 1
"""Largest dimension of a tensor."""


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises CheckpointError."""
    value = read_json(path, CheckpointError)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return value


def integer(
    config: Mapping[str, Any],
    key: str,
    default: int | None = None,
    *,
    low: int = 1,
    high: int = MAX_SIZE,
) -> int:
    """The whole number at `key`, from `low` to `high`; without a default the key is needed."""
    value = _get(config, key, default)
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{key} must be a whole number from {low} to {high}, not {shown(value)}")
    return value


def number(
    config: Mapping[str, Any], key: str, default: float | None = None, *, low: float, high: float
) -> float:
    """The number at `key`, from `low` to `high`; without a default the key is needed."""
    value = _get(config, key, default)
    if type(value) not in (int, float) or not low <= value <= high:
        raise ValueError(f"{key} must be a number from {low:g} to {high:g}, not {shown(value)}")
    return float(value)


def boolean(config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """The true or false at `key`."""
    value = _get(config, key, default)
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, not {shown(value)}")
    return value


def integers(config: Mapping[str, Any], key: str) -> list[int]:
    """The list of whole numbers at `key`; empty by default."""
    value = _get(config, key, [])
    if not isinstance(value, list) or any(type(element) is not int for element in value):
        raise ValueError(f"{key} must be a list of whole numbers, not {shown(value)}")
    return value


def table(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The object at `key`; empty by default."""
    value = _get(config, key, {})
    if not isinstance(value, dict):
        raise ValueError(f"{key} must be an object, not {shown(value)}")
    return value


def shown(value: Any) -> str:
    """A value as JSON, cut where it is long, for a complaint about it."""
    try:
        text = json.dumps(value)
    except RecursionError:  # it was read with more room on the stack
        return "a value nested too deeply"
    return text if len(text) <= 60 else text[:60] + "..."


def _get(config: Mapping[str, Any], key: str, default: Any) -> Any:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise KeyError(key)
    return value
