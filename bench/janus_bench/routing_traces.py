"""Routing to judge placements and schedules on: recorded from trained models, or made up.

Shapes: N tokens, K experts of a token, E logical experts.
"""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from janus_server.errors import ConfigError

RECORDED = Path(__file__).parent / "routing"
"""Recordings that come with Janus; `record_routing` makes more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingSample:
    """Experts that tokens chose, layer by layer."""

    num_experts: int
    layers: Mapping[int, npt.NDArray[np.int64]]
    """Layer index -> [N, K], the most likely expert first."""


def read_routing(path: Path) -> RoutingSample:
    """Read what `record_routing` wrote; raises ConfigError."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            layers, ids_LNK = arrays["layers"], arrays["topk_ids"]
            num_experts = int(arrays["num_experts"])
    except OSError as error:
        reason = error.strerror or "it is no .npz file"
        raise ConfigError(f"cannot read the routing trace {path}: {reason}") from None
    except (KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"{path} is no routing trace: it needs the arrays layers, topk_ids and num_experts "
            f"({error})"
        ) from None
    if ids_LNK.ndim != 3 or ids_LNK.dtype.kind not in "iu" or len(ids_LNK) != layers.size:
        raise ConfigError(f"{path}: topk_ids must be integers [layers, tokens, experts of a token]")
    if not ids_LNK.size:
        raise ConfigError(f"{path} holds no tokens")
    if ids_LNK.min() < 0 or ids_LNK.max() >= num_experts:
        raise ConfigError(f"{path}: topk_ids must be experts 0 to {num_experts - 1}")
    sorted_LNK = np.sort(ids_LNK, axis=2)
    if (sorted_LNK[:, :, 1:] == sorted_LNK[:, :, :-1]).any():
        raise ConfigError(f"{path}: a token names an expert twice")
    return RoutingSample(
        num_experts=num_experts,
        layers={
            int(layer): ids_NK.astype(np.int64)
            for layer, ids_NK in zip(layers, ids_LNK, strict=True)
        },
    )


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
