"""Open a Hugging Face model folder and check it before anything is spawned or read. Torch-free.

Only config.json, the safetensors headers and their index are looked at: no pickle, no remote code,
no weights. After `Checkpoint.open` every tensor that the model needs is known to be there, whole,
and of the shape that the config promises.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from janus_scheduler.model_spec import ModelSpec
from janus_server.errors import CheckpointError
from janus_server.model.config_json import shown
from janus_server.model.families import Family, family_of

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SHARD_NAME = re.compile(r"[\w.-]{1,200}\.safetensors", re.ASCII)
_FLOAT_DTYPES = frozenset({"F32", "BF16", "F16"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checked model folder."""

    path: Path
    spec: ModelSpec
    family: Family
    shards: Mapping[str, Path]
    """Tensor name -> the safetensors file that holds it."""
    fingerprint: str
    """SHA-256 of config.json."""

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Check the folder at `path`; raises CheckpointError with one sentence on what is wrong."""
        folder = Path(path)
        if not os.path.isdir(folder):  # Path.is_dir raises on names too long for the system
            raise CheckpointError(f"no checkpoint folder at {folder}")
        config_path = folder / "config.json"
        config = _read_json(config_path)
        family = family_of(config, config_path)
        try:
            spec = family.parse_spec(config)
        except (KeyError, ValueError) as error:
            reason = f"has no {error}" if isinstance(error, KeyError) else f"is unusable: {error}"
            raise CheckpointError(f"{config_path} {reason}") from None
        shards = _find_shards(folder)
        spec = dataclasses.replace(
            spec,
            eos_token_ids=_eos_token_ids(folder, config, spec),
            # A head of its own is used whatever config.json says, as in transformers.
            tied_embeddings=spec.tied_embeddings and family.names.lm_head not in shards,
        )
        _check_tensors(folder, family.tensor_shapes(spec), shards)
        return cls(
            path=folder,
            spec=spec,
            family=family,
            shards=shards,
            fingerprint=hashlib.sha256(config_path.read_bytes()).hexdigest(),
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return value


def _eos_token_ids(folder: Path, config: Mapping[str, Any], spec: ModelSpec) -> tuple[int, ...]:
    # Chat models list further end tokens in generation_config.json; they win, as in transformers.
    # Where it lists none, those of config.json still end a text; transformers would go on.
    path = folder / "generation_config.json"
    eos = _read_json(path).get("eos_token_id") if path.exists() else None
    if eos is None:
        path, eos = folder / "config.json", config.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(token) is int and 0 <= token < spec.vocab_size for token in ids):
        raise CheckpointError(
            f"eos_token_id in {path} must be token ids below the vocabulary's {spec.vocab_size}, "
            f"not {shown(eos)}"
        )
    return tuple(ids)


def _find_shards(folder: Path) -> dict[str, Path]:
    if not (folder / _INDEX).exists():
        if not (folder / _SINGLE).exists():
            raise CheckpointError(
                f"{folder} has neither {_SINGLE} nor {_INDEX}; other weight formats are not read"
            )
        return dict.fromkeys(_tensor_names(folder / _SINGLE), folder / _SINGLE)
    weight_map = _read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{folder / _INDEX} has no weight_map from tensors to safetensors files"
        )
    for name in weight_map.values():
        # A shard beside the index, never a path that leads out of the folder.
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
            raise CheckpointError(
                f"weight_map in {folder / _INDEX} must name safetensors files beside it, "
                f"not {shown(name)}"
            )
    for name in sorted(set(weight_map.values())):
        if not (folder / name).is_file():
            raise CheckpointError(f"the shard {name} is missing from {folder}")
    return {tensor: folder / name for tensor, name in weight_map.items()}


def _open_shard(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file (truncated or damaged): {error}"
        ) from None


def _tensor_names(path: Path) -> list[str]:
    with _open_shard(path) as shard:
        return list(shard.keys())


def _check_tensors(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], shards: Mapping[str, Path]
) -> None:
    missing = [name for name in shapes if name not in shards]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the {len(shapes)} tensors that its config.json "
            f"calls for, the first being {missing[0]}"
        )
    by_shard: dict[Path, list[str]] = {}
    for name in shapes:
        by_shard.setdefault(shards[name], []).append(name)
    for path, names in by_shard.items():
        with _open_shard(path) as shard:
            present = set(shard.keys())
            for name in names:
                if name not in present:
                    raise CheckpointError(f"{path} does not hold {name}, which the index says")
                _check_tensor(path, name, shard.get_slice(name), shapes[name])


def _check_tensor(path: Path, name: str, tensor: Any, expected: tuple[int, ...]) -> None:
    shape = tuple(tensor.get_shape())
    if shape != expected:
        raise CheckpointError(
            f"config.json and tensors disagree: {name} in {path} has shape {list(shape)}, "
            f"not {list(expected)}"
        )
    if tensor.get_dtype() not in _FLOAT_DTYPES:
        raise CheckpointError(
            f"{name} in {path} is stored as {tensor.get_dtype()}; F32, BF16 and F16 are read"
        )
