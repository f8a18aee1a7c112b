"""Which model a process serves, and how it computes."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from janus_scheduler.model_spec import ModelSpec
from janus_server.bounds import Between
from janus_server.errors import ConfigError

MaxContext = Annotated[int, Between(0, 2**31 - 1)]
"""Longest prompt plus completion in tokens; `context_limit` holds it to the model."""

DeviceIndex = Annotated[int, Between(0, 1023)]
"""Which GPU; `device_of` holds it to those that there are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Model."""

    checkpoint: Annotated[str, tyro.conf.arg(metavar="PATH_TO_CHECKPOINT"), tyro.conf.Positional]
    """Hugging Face model folder: config.json, *.safetensors, tokenizer.json."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where the workers compute."""

    dtype: Literal["bf16", "fp32"] = "bf16"
    """Number format of weights, activations and KV cache."""

    @property
    def value_bytes(self) -> int:
        """Bytes of one number."""
        return {"bf16": 2, "fp32": 4}[self.dtype]


def context_limit(spec: ModelSpec, max_context: int) -> int:
    """Longest prompt plus completion in tokens, where `max_context` 0 means all that the model has.

    Raises ConfigError above what the model was made for, and where no request is short enough.
    """
    if max_context == 1 or max_context > spec.max_context:
        raise ConfigError(
            f"--max-context must be 0, or from 2 to the model's {spec.max_context}, not "
            f"{max_context}"
        )
    return max_context or spec.max_context
