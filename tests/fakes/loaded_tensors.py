"""Find every tensor that a part of Janus holds."""

from collections.abc import Iterator, Mapping
from types import MethodType
from typing import Any

import torch


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested dataclasses, containers, objects, and objects of bound methods."""
    if isinstance(value, torch.Tensor):
        yield value
        return
    parts: list[Any] = []
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, list | tuple):
        parts = list(value)
    elif isinstance(value, MethodType):
        parts = [value.__self__]
    elif hasattr(value, "__dataclass_fields__"):
        parts = [getattr(value, name) for name in value.__dataclass_fields__]
    elif type(value).__module__.startswith("janus_"):
        parts = list(getattr(value, "__dict__", {}).values())
    for part in parts:
        yield from tensors_in(part)
