"""Random-weight checkpoints, written by transformers, to measure and to test with."""

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging as transformers_logging

BENCH_MODEL = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
    "norm_topk_prob": True,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
"""The model of the CPU comparison: 120 M parameters, 17 M of them read for one token."""


def write_random_checkpoint(
    folder: Path, config: dict[str, Any], *, seed: int = 0, max_shard_size: str = "5GB"
) -> None:
    """Write a Qwen3-MoE of these `Qwen3MoeConfig` values with random weights."""
    transformers_logging.disable_progress_bar()
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**config))
    # Norm weights start as ones, which would hide a norm that is left out.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
