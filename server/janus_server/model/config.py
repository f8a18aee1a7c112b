"""Which model a process serves, and how it computes."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from janus_scheduler.model_spec import ModelSpec
from janus_server.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Model."""

    checkpoint: Annotated[str, tyro.conf.arg(metavar="PATH_TO_CHECKPOINT"), tyro.conf.Positional]
    """Hugging Face model folder: config.json, *.safetensors, tokenizer.json."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where the workers compute."""

    dtype: Literal["bf16", "fp32"] = "bf16"
    """Number format of weights, activations and KV cache."""


def context_limit(spec: ModelSpec, max_context: int) -> int:
    """Longest prompt plus completion in tokens, where `max_context` 0 means all that the model has.

    Raises ConfigError below 0 and above what the model was made for.
    """
    if not 0 <= max_context <= spec.max_context:
        raise ConfigError(
            f"--max-context must be between 0 and the model's {spec.max_context}, not {max_context}"
        )
    return max_context or spec.max_context
