"""A short name of what a checkpoint answers, for processes that must serve the same model.

Reading all weights would take minutes, so of each tensor a few spans are read, spread from its
first to its last byte. Training that touches a tensor changes most of its values, so that it
changes the fingerprint; an edit of single values by hand may be missed. Paths, times, the split
into shards and tensors that are not served do not count.
"""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from janus_scheduler.model_spec import ModelSpec
from janus_server.errors import CheckpointError
from janus_server.model.stored_tensors import StoredTensor

_SPANS = 4
_SPAN_BYTES = 1024
"""So at most 4 KiB of each tensor: 2048 values in bf16, of about as many pages as _SPANS."""
_NUM_THREADS = 8
"""Shards that are read at once: the disk's latency bounds, not the hashing."""


def fingerprint(spec: ModelSpec, tensors: Mapping[str, StoredTensor]) -> str:
    """SHA-256 of all that was made of the JSON files, and of samples of the tensors.

    Reads at most _SPANS * _SPAN_BYTES of each tensor; raises CheckpointError.
    """
    shards: dict[Path, dict[str, StoredTensor]] = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        shards.setdefault(tensor.path, {})[name] = tensor
    digests: dict[str, bytes] = {}
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for of_shard in pool.map(_digests, shards.keys(), shards.values()):
            digests |= of_shard
    whole = hashlib.sha256(repr(spec).encode())
    for name in sorted(digests):
        whole.update(digests[name])
    return whole.hexdigest()


def _digests(path: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, bytes]:
    """A digest of each of these tensors, all in the shard at `path`."""
    try:
        with path.open("rb", buffering=0) as file:
            return {name: _digest(name, tensor, file.fileno()) for name, tensor in tensors.items()}
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None


def _digest(name: str, tensor: StoredTensor, file: int) -> bytes:
    digest = hashlib.sha256(f"{name} {tensor.dtype} {tensor.shape}".encode())
    if tensor.num_bytes <= _SPANS * _SPAN_BYTES:
        digest.update(os.pread(file, tensor.num_bytes, tensor.start))
    else:
        for span in range(_SPANS):
            offset = span * (tensor.num_bytes - _SPAN_BYTES) // (_SPANS - 1)
            digest.update(os.pread(file, _SPAN_BYTES, tensor.start + offset))
    return digest.digest()
