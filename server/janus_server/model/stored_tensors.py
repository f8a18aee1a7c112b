"""Where the tensors of a model folder lie: its index and the headers of its safetensors files."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from janus_server.errors import CheckpointError
from janus_server.input_file import check_regular, is_there
from janus_server.model.config_json import read_object, shown

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SHARD_NAME = re.compile(r"[\w.-]{1,200}\.safetensors", re.ASCII)
_FLOAT_DTYPES = frozenset({"F32", "BF16", "F16"})
_PREFIX = "model."
"""Whether a name begins with it makes no difference to transformers."""
_LENGTH_BYTES = 8
"""A safetensors file begins with the length of its header, a little-endian number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileVersion:
    """What tells a file from the one that was there before, without reading it.

    The device does not count, which a network file system changes when it is mounted again; nor
    does the time of the last change of status, which a chmod or a further hard link sets.
    """

    inode: int
    num_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> "FileVersion":
        """The version that has this status."""
        return cls(inode=status.st_ino, num_bytes=status.st_size, modified_ns=status.st_mtime_ns)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One tensor of a safetensors file, from the file's header."""

    path: Path
    version: FileVersion
    """Of the file, when the header was read."""
    dtype: str
    """As safetensors spells it: F32, BF16, F16, ..."""
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""
    num_bytes: int

    def check_unchanged(self) -> None:
        """Refuse a file that is no longer the one whose header was read; raises CheckpointError."""
        try:
            version = FileVersion.of(os.stat(self.path))
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from None
        if version != self.version:
            raise CheckpointError(
                f"{self.path} was changed or replaced after it was checked, and before all "
                "its weights were read; start again"
            )


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model folder, by name; raises CheckpointError."""
    tensors: dict[str, StoredTensor] = {}
    for path in _weight_files(folder):
        header = _read_header(path)
        for name in header.keys() & tensors.keys():
            raise CheckpointError(f"{path} and {tensors[name].path} both hold {shown(name)}")
        tensors |= header
    return tensors


def pick_tensors(
    folder: Path, stored: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, StoredTensor]:
    """The tensors that `shapes` calls for, each as it should be; raises CheckpointError."""
    missing = [name for name in shapes if name not in stored]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the {len(shapes)} tensors that its config.json "
            f"calls for, the first being {missing[0]}"
        )
    for name, shape in shapes.items():
        _check_tensor(name, stored[name], shape)
        for other in (_PREFIX + name, name.removeprefix(_PREFIX)):
            if other != name and other in stored:
                raise CheckpointError(f"{folder} holds both {name} and {other}, one tensor twice")
    return {name: stored[name] for name in shapes}


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / _SINGLE, folder / _INDEX
    if not is_there(index):
        if not is_there(single):
            raise CheckpointError(
                f"{folder} has neither {_SINGLE} nor {_INDEX}; other weight formats are not read"
            )
        return [single]
    if is_there(single):
        raise CheckpointError(
            f"{folder} has both {_SINGLE} and {_INDEX}, and which weights are meant is not known"
        )
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map from tensors to safetensors files")
    for name in weight_map.values():
        # A shard beside the index, never a path that leads out of the folder.
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
            raise CheckpointError(
                f"weight_map in {index} must name safetensors files beside it, not {shown(name)}"
            )
    # The files are what counts, as in transformers, not which tensor is said to be in which.
    names = sorted(set(weight_map.values()))
    for name in names:
        if not is_there(folder / name):
            raise CheckpointError(f"the shard {name} is missing from {folder}")
    return [folder / name for name in names]


def _read_header(path: Path) -> dict[str, StoredTensor]:
    check_regular(path, CheckpointError)
    try:
        # The library that will read the tensors judges whether the file is whole.
        with path.open("rb") as file, safe_open(path, framework="numpy", backend="pread"):
            version = FileVersion.of(os.fstat(file.fileno()))
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            header: dict[str, Any] = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file (truncated or damaged): {error}"
        ) from None
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, end = entry["data_offsets"]
        tensors[name] = StoredTensor(
            path=path,
            version=version,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            start=_LENGTH_BYTES + length + first,
            num_bytes=end - first,
        )
    return tensors


def _check_tensor(name: str, tensor: StoredTensor, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise CheckpointError(
            f"config.json and tensors disagree: {name} in {tensor.path} has shape "
            f"{list(tensor.shape)}, not {list(expected)}"
        )
    if tensor.dtype not in _FLOAT_DTYPES:
        raise CheckpointError(
            f"{name} in {tensor.path} is stored as {tensor.dtype}; F32, BF16 and F16 are read"
        )
