"""The tensors behind the KV blocks of one attention worker."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from janus_scheduler.kv_blocks import block_runs
from janus_scheduler.model_spec import ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class KvCache:
    """Keys and values of every layer. M KV heads, S slots (blocks times block size), D head dim."""

    block_size: int
    keys: tuple[torch.Tensor, ...]
    """Per layer [M, S, D]."""
    values: tuple[torch.Tensor, ...]

    @classmethod
    def allocate(
        cls,
        spec: ModelSpec,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "KvCache":
        """Reserve the memory; on a CPU the system commits it page by page as it is written."""
        shape = (spec.num_kv_heads, num_blocks * block_size, spec.head_dim)

        def per_layer() -> tuple[torch.Tensor, ...]:
            return tuple(
                torch.empty(shape, dtype=dtype, device=device) for _ in range(spec.num_layers)
            )

        return cls(block_size=block_size, keys=per_layer(), values=per_layer())

    def slots(self, block_table: Sequence[int], start: int, stop: int) -> list[int]:
        """The slot of each position from `start` to `stop`."""
        size = self.block_size
        return [block_table[at // size] * size + at % size for at in range(start, stop)]

    def runs(self, block_table: Sequence[int], context: int) -> list[tuple[int, int]]:
        """(first slot, number of slots) of the adjacent stretches that hold `context` tokens."""
        runs: list[tuple[int, int]] = []
        num_blocks = -(-context // self.block_size)
        for first_block, count in block_runs(block_table[:num_blocks]):
            length = min(count * self.block_size, context)
            runs.append((first_block * self.block_size, length))
            context -= length
        return runs
