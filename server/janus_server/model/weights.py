"""Read single tensors of a checkpoint, lazily, so that a worker touches only what it owns."""

import math
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from janus_server.errors import CheckpointError, ConfigError
from janus_server.glibc import give_back_freed_memory
from janus_server.model.checkpoint import Checkpoint
from janus_server.model.config import ModelConfig
from janus_server.model.stored_tensors import StoredTensor

_GIVE_BACK_BYTES = 2**28
"""Once so much was read, gaps between the weights are given back to the system: they would grow
with the weights."""

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def dtype_of(config: ModelConfig) -> torch.dtype:
    """The torch dtype that the configuration names."""
    return _DTYPES[config.dtype]


def device_of(config: ModelConfig, index: int) -> torch.device:
    """The device to compute on; raises ConfigError where there is none."""
    if config.device == "cpu":
        return torch.device("cpu")
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"--device cuda: GPU {index} was asked for, {torch.cuda.device_count()} can be used"
        )
    return torch.device("cuda", index)


class WeightReader:
    """Reads tensors by name in the serving dtype, each from its place in its shard.

    The tensors are copies: once this context is left, the files may be replaced. A file that was
    replaced or written to since the checkpoint was checked is refused, when the first of its
    tensors is read and again on leaving.
    """

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = device
        self._stack = ExitStack()
        self._open_shards: dict[Path, Any] = {}
        self._first_read: dict[Path, StoredTensor] = {}
        """The first tensor that was asked for, of each shard."""
        self._bytes_read = 0
        """Since memory was last given back."""

    def __enter__(self) -> "WeightReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open_shards.clear()
        self._stack.close()
        give_back_freed_memory()
        # A change also explains an error that there may be.
        for tensor in self._first_read.values():
            tensor.check_unchanged()

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, in the dtype and on the device of this reader.

        Raises CheckpointError where it cannot be read, or holds values that are no numbers.
        """
        stored = self.checkpoint.tensors[name]
        self._bytes_read += stored.num_bytes
        if self._bytes_read > _GIVE_BACK_BYTES:
            give_back_freed_memory()
            self._bytes_read = 0
        path = stored.path
        try:
            if path not in self._open_shards:
                stored.check_unchanged()
                self._first_read[path] = stored
                # Tensors of a mapped file would change with it.
                shard = safe_open(path, framework="pt", backend="pread")
                self._open_shards[path] = self._stack.enter_context(shard)
            tensor: torch.Tensor = self._open_shards[path].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {name} from {path}: {error}") from None
        converted = tensor.to(device=self.device, dtype=self.dtype)
        # A sum is finite only if each value is, and takes a single fast pass.
        if not converted.sum().isfinite():
            _check_finite(name, path, tensor, converted)
        return converted

    def read_rows(self, *names: str) -> torch.Tensor:
        """Several tensors, one below the other."""
        return torch.cat([self.read(name) for name in names])


def _check_finite(name: str, path: Path, stored: torch.Tensor, converted: torch.Tensor) -> None:
    """Refuse NaN and infinities; raises nothing where only the sum of the values overflowed."""
    bad = ~converted.isfinite()
    if not bad.any():
        return
    index = bad.nonzero()[0].tolist()
    value = stored[tuple(index)].item()
    served = next(name for name, dtype in _DTYPES.items() if dtype == converted.dtype)
    why = (
        f"a number beyond the range of {served}; --dtype fp32 can hold it"
        if math.isfinite(value)
        else "which is no number that a model can be served with"
    )
    raise CheckpointError(f"{name} in {path} holds {value:g} at {index}, {why}")
