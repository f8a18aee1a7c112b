"""A short name of what a checkpoint answers, for processes that must serve the same model.

Small checkpoints are read whole. Reading all weights of a large one would take minutes, so of each
of its tensors a few spans are read, spread from its first to its last byte. Training that touches a
tensor changes most of its values, so that it changes the fingerprint; an edit of single values by
hand may be missed. Paths, times, the split
into shards and tensors that are not served do not count.
"""

import functools
import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from janus_scheduler.model_spec import ModelSpec
from janus_server.errors import CheckpointError
from janus_server.model.stored_tensors import StoredTensor

_WHOLE_BYTES = 2**28
"""Checkpoints up to this size are read whole: a quarter of a second."""
_SPANS = 4
_SPAN_BYTES = 1024
"""So at most 4 KiB of each tensor: 2048 values in bf16, of about as many pages as _SPANS."""
_NUM_THREADS = 8
"""Shards that are read at once: the disk's latency bounds, not the hashing."""


def fingerprint(spec: ModelSpec, tensors: Mapping[str, StoredTensor]) -> str:
    """SHA-256 of all that was made of the JSON files, and of samples of the tensors.

    Reads at most _SPANS * _SPAN_BYTES of each tensor, or all of up to _WHOLE_BYTES; raises
    CheckpointError.
    """
    is_small = sum(tensor.num_bytes for tensor in tensors.values()) <= _WHOLE_BYTES
    shards: dict[Path, dict[str, StoredTensor]] = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        shards.setdefault(tensor.path, {})[name] = tensor
    digests: dict[str, bytes] = {}
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        digests_of = functools.partial(_digests, whole=is_small)
        for of_shard in pool.map(digests_of, shards.keys(), shards.values()):
            digests |= of_shard
    whole = hashlib.sha256(repr(spec).encode())
    for name in sorted(digests):
        whole.update(digests[name])
    return whole.hexdigest()


def _digests(path: Path, tensors: Mapping[str, StoredTensor], *, whole: bool) -> dict[str, bytes]:
    """A digest of each of these tensors, all in the shard at `path`."""
    try:
        with path.open("rb", buffering=0) as file:
            return {
                name: _digest(name, tensor, file.fileno(), whole=whole)
                for name, tensor in tensors.items()
            }
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None


def _digest(name: str, tensor: StoredTensor, file: int, *, whole: bool) -> bytes:
    digest = hashlib.sha256(f"{name} {tensor.dtype} {tensor.shape}".encode())
    if whole or tensor.num_bytes <= _SPANS * _SPAN_BYTES:
        digest.update(os.pread(file, tensor.num_bytes, tensor.start))
    else:
        for span in range(_SPANS):
            offset = span * (tensor.num_bytes - _SPAN_BYTES) // (_SPANS - 1)
            digest.update(os.pread(file, _SPAN_BYTES, tensor.start + offset))
    return digest.digest()
