"""Open a Hugging Face model folder and check it before anything is spawned or read. Torch-free.

Only config.json, the safetensors headers and their index are looked at: no pickle, no remote code,
no weights. After `Checkpoint.open` every tensor that the model needs is known to be there, whole,
and of the shape that the config promises.
"""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from janus_scheduler.model_spec import ModelSpec
from janus_server.errors import CheckpointError
from janus_server.input_file import is_there
from janus_server.model.config_json import read_object, shown
from janus_server.model.families import Family, family_of
from janus_server.model.fingerprint import fingerprint
from janus_server.model.stored_tensors import StoredTensor, pick_tensors, stored_tensors
from janus_server.model.unserved_keys import refuse_unserved_generation


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checked model folder."""

    path: Path
    spec: ModelSpec
    family: Family
    tensors: Mapping[str, StoredTensor]
    """All that the model needs, by name."""

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Check the folder at `path`; raises CheckpointError with one sentence on what is wrong."""
        if not str(path):  # a shell variable that is not set; for Path it is the current folder
            raise CheckpointError("the path of the checkpoint is empty")
        folder = Path(path)
        try:
            os.fspath(folder).encode()
        except UnicodeEncodeError:  # safetensors and tokenizers cannot open it
            raise CheckpointError(f"the path of the checkpoint is not UTF-8: {folder}") from None
        if not os.path.isdir(folder):  # Path.is_dir raises on names too long for the system
            raise CheckpointError(f"no checkpoint folder at {folder}")
        if is_there(folder / "adapter_config.json"):
            raise CheckpointError(
                f"{folder} holds an adapter (adapter_config.json), which would have to be merged "
                "into the weights first"
            )
        config_path = folder / "config.json"
        config = read_object(config_path)
        family = family_of(config, config_path)
        try:
            spec = family.parse_spec(config)
        except (KeyError, ValueError) as error:
            reason = f"has no {error}" if isinstance(error, KeyError) else f"is unusable: {error}"
            raise CheckpointError(f"{config_path} {reason}") from None
        _check_generation(folder, config)
        stored = stored_tensors(folder)
        spec = dataclasses.replace(
            spec,
            eos_token_ids=_eos_token_ids(folder, config, spec),
            # A head of its own is used whatever config.json says, as in transformers.
            tied_embeddings=spec.tied_embeddings and family.names.lm_head not in stored,
        )
        tensors = pick_tensors(folder, stored, family.tensor_shapes(spec))
        return cls(path=folder, spec=spec, family=family, tensors=tensors)

    def fingerprint(self) -> str:
        """What processes compare to know that they serve the same model; reads some of it."""
        return fingerprint(self.spec, self.tensors)


def _check_generation(folder: Path, config: Mapping[str, Any]) -> None:
    path = folder / "generation_config.json"
    if is_there(path):
        config = read_object(path)
    else:  # as transformers
        path = folder / "config.json"
    try:
        refuse_unserved_generation(config)
    except ValueError as error:
        raise CheckpointError(f"{path} is unusable: {error}") from None


def _eos_token_ids(folder: Path, config: Mapping[str, Any], spec: ModelSpec) -> tuple[int, ...]:
    # Chat models list further end tokens in generation_config.json; they win, as in transformers.
    # Where it lists none, those of config.json still end a text; transformers would go on.
    path = folder / "generation_config.json"
    eos = read_object(path).get("eos_token_id") if is_there(path) else None
    if eos is None:
        path, eos = folder / "config.json", config.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(token) is int and 0 <= token < spec.vocab_size for token in ids):
        raise CheckpointError(
            f"eos_token_id in {path} must be token ids below the vocabulary's {spec.vocab_size}, "
            f"not {shown(eos)}"
        )
    return tuple(ids)
