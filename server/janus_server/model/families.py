"""What a model family is, and which are served.

A family differs from the others in how it spells config.json and its tensors. Everything else is
shared: a new family is one file that builds a `Family`, and one line in `family_of`.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from janus_scheduler.model_spec import ModelSpec
from janus_server.errors import CheckpointError
from janus_server.model.config_json import shown

_MODULES = {"qwen3_moe": "janus_server.model.qwen3_moe"}
"""`model_type` in config.json -> the module whose FAMILY serves it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorNames:
    """How a family spells its tensors; `{layer}` and `{expert}` are filled in."""

    embedding: str
    final_norm: str
    lm_head: str
    attention_norm: str
    """Before attention."""
    ffn_norm: str
    """Before the feed-forward part, dense or mixture."""
    query: str
    key: str
    value: str
    attention_output: str
    query_norm: str | None
    """Per-head RMSNorm of the queries; None: the family has none."""
    key_norm: str | None
    gate: str
    expert_gate: str
    expert_up: str
    expert_down: str
    dense_gate: str
    dense_up: str
    dense_down: str

    def bias(self, name: str) -> str:
        """Name of the bias that goes with a weight."""
        return name.removesuffix(".weight") + ".bias"


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One way to spell a checkpoint."""

    parse_spec: Callable[[Mapping[str, Any]], ModelSpec]
    """config.json -> ModelSpec; raises KeyError or ValueError on what it cannot serve."""
    names: TensorNames

    def tensor_shapes(self, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
        """Every tensor that a whole model needs, with its shape."""
        names, hidden = self.names, spec.hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            names.embedding: (spec.vocab_size, hidden),
            names.final_norm: (hidden,),
        }
        if not spec.tied_embeddings:
            shapes[names.lm_head] = (spec.vocab_size, hidden)
        for layer in range(spec.num_layers):
            of_layer = self._attention_shapes(spec)
            if layer not in spec.moe_layers:
                dense = spec.dense_intermediate_size
                of_layer[names.dense_gate] = of_layer[names.dense_up] = (dense, hidden)
                of_layer[names.dense_down] = (hidden, dense)
            shapes |= {name.format(layer=layer): shape for name, shape in of_layer.items()}
        for layer in spec.moe_layers:
            shapes[names.gate.format(layer=layer)] = (spec.num_experts, hidden)
            wide, deep = spec.expert_intermediate_size, hidden
            for expert in range(spec.num_experts):
                shapes[names.expert_gate.format(layer=layer, expert=expert)] = (wide, deep)
                shapes[names.expert_up.format(layer=layer, expert=expert)] = (wide, deep)
                shapes[names.expert_down.format(layer=layer, expert=expert)] = (deep, wide)
        return shapes

    def _attention_shapes(self, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
        names, hidden = self.names, spec.hidden_size
        query, key = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            names.attention_norm: (hidden,),
            names.ffn_norm: (hidden,),
            names.query: (query, hidden),
            names.key: (key, hidden),
            names.value: (key, hidden),
            names.attention_output: (hidden, query),
        }
        if spec.attention_bias:
            shapes |= {names.bias(name): shape[:1] for name, shape in list(shapes.items())[2:]}
        for norm in (names.query_norm, names.key_norm):
            if norm is not None:
                shapes[norm] = (spec.head_dim,)
        return shapes


def family_of(config: Mapping[str, Any], config_path: Path) -> Family:
    """Find the family that serves a config.json; raises CheckpointError where there is none."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _MODULES:
        raise CheckpointError(
            f"{config_path} has the model_type {shown(model_type)}; served are "
            + ", ".join(sorted(_MODULES))
        )
    family: Family = importlib.import_module(_MODULES[model_type]).FAMILY
    return family
