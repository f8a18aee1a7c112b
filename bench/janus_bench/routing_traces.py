"""Routing to judge placements and schedules on: recorded from trained models, or made up.

Shapes: N tokens, K experts of a token, E logical experts.
"""

import io
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from janus_server.errors import ConfigError
from janus_server.input_file import read_file
from janus_server.model.qwen3_moe import MAX_EXPERTS, MAX_LAYERS

RECORDED = Path(__file__).parent / "routing"
"""Recordings that come with Janus; `record_routing` makes more."""
_ARRAYS = ("layers", "topk_ids", "num_experts")
_MAX_BYTES = 2**28
"""Of a file, and of what it unpacks to: three million tokens of ten layers, 8 experts each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingSample:
    """Experts that tokens chose, layer by layer."""

    num_experts: int
    layers: Mapping[int, npt.NDArray[np.int64]]
    """Layer index -> [N, K], the most likely expert first."""


def read_routing(path: Path) -> RoutingSample:
    """Read what `record_routing` wrote, of which nothing is trusted; raises ConfigError."""
    content = read_file(path, ConfigError, max_bytes=_MAX_BYTES)
    try:
        layers, ids_LNK, num_experts = _arrays(content)
    except Exception as error:  # NumPy and zipfile raise errors of any kind for a damaged file
        raise ConfigError(
            f"{path} is no routing trace: it needs the arrays {', '.join(_ARRAYS)} "
            f"({type(error).__name__}: {error})"
        ) from None
    try:
        return _checked(layers, ids_LNK, num_experts)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def _arrays(content: bytes) -> list[npt.NDArray[Any]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if sum(member.file_size for member in archive.infolist()) > _MAX_BYTES:
            raise ValueError(f"it unpacks to more than {_MAX_BYTES >> 20} MiB")
    with (
        warnings.catch_warnings(action="error"),  # the reader warns of some damage
        np.load(io.BytesIO(content), allow_pickle=False) as arrays,
    ):
        return [arrays[name] for name in _ARRAYS]


def _checked(
    layers: npt.NDArray[Any], ids_LNK: npt.NDArray[Any], num_experts: npt.NDArray[Any]
) -> RoutingSample:
    """Raises ValueError with a sentence."""
    if num_experts.shape or not _all_within(num_experts, 1, MAX_EXPERTS):
        raise ValueError(f"num_experts must be one integer from 1 to {MAX_EXPERTS}")
    if layers.ndim != 1 or not _all_within(layers, 0, MAX_LAYERS - 1):
        raise ValueError(f"layers must be a row of integers from 0 to {MAX_LAYERS - 1}")
    if len(np.unique(layers)) < len(layers):
        raise ValueError("layers names a layer twice")
    if ids_LNK.ndim != 3 or ids_LNK.dtype.kind not in "iu" or len(ids_LNK) != len(layers):
        raise ValueError("topk_ids must be integers [layers, tokens, experts of a token]")
    if not ids_LNK.size:
        raise ValueError("the trace holds no tokens")
    count = int(num_experts)
    if not _all_within(ids_LNK, 0, count - 1):
        raise ValueError(f"topk_ids must be experts 0 to {count - 1}")
    sorted_LNK = np.sort(ids_LNK, axis=2)
    if (sorted_LNK[:, :, 1:] == sorted_LNK[:, :, :-1]).any():
        raise ValueError("a token names an expert twice")
    return RoutingSample(
        num_experts=count,
        layers={
            int(layer): ids_NK.astype(np.int64)
            for layer, ids_NK in zip(layers, ids_LNK, strict=True)
        },
    )


def _all_within(array: npt.NDArray[Any], low: int, high: int) -> bool:
    """Whether these are integers from `low` to `high`; true of no numbers."""
    if array.dtype.kind not in "iu":
        return False
    return not array.size or bool(array.min() >= low and array.max() <= high)


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticRouting:
    """Routing of a stated skew and co-activation, in the shape of a model.

    Each token is of a topic. Its experts are drawn without repetition in proportion to a Zipf law
    over a random order of the experts, those of the topic's block being `block_boost` times as
    likely. So experts of a block are chosen together.
    """

    num_experts: int
    top_k: int
    zipf: float
    """Exponent: the r-th most popular expert is taken in proportion to r ** -zipf; 0: all alike."""
    num_blocks: int = 8
    """Co-activation blocks, as many as topics; experts fall into them at random."""
    block_boost: float = 4.0
    """1: experts are chosen together only because they are popular."""

    def sample(self, num_tokens: int, *, num_layers: int = 1, seed: int = 0) -> RoutingSample:
        """Draw a trace; each layer has an order and blocks of its own."""
        rng = np.random.default_rng(seed)
        layers: dict[int, npt.NDArray[np.int64]] = {}
        topic_N = rng.integers(self.num_blocks, size=num_tokens)
        for layer in range(num_layers):
            popularity_E = rng.permutation(np.arange(1.0, self.num_experts + 1) ** -self.zipf)
            block_E = rng.permutation(np.arange(self.num_experts) % self.num_blocks)
            boost_NE = np.where(block_E == topic_N[:, None], self.block_boost, 1.0)
            # The Gumbel trick: the largest of log-weights plus Gumbel noise are distributed like a
            # draw without repetition in proportion to the weights.
            keys_NE = np.log(popularity_E * boost_NE) + rng.gumbel(size=boost_NE.shape)
            layers[layer] = np.argsort(-keys_NE, axis=1)[:, : self.top_k]
        return RoutingSample(num_experts=self.num_experts, layers=layers)
