"""Which model a process serves, and how it computes."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Model."""

    checkpoint: Annotated[str, tyro.conf.arg(metavar="PATH_TO_CHECKPOINT"), tyro.conf.Positional]
    """Hugging Face model folder: config.json, *.safetensors, tokenizer.json."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where the workers compute."""

    dtype: Literal["bf16", "fp32"] = "bf16"
    """Number format of weights, activations and KV cache."""
