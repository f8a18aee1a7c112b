"""Random-weight checkpoints, written by transformers, and what transformers makes of them."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Qwen3MoeForCausalLM

from janus_bench.checkpoints import write_random_checkpoint

TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "intermediate_size": 96,
    "norm_topk_prob": True,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    # Wide enough that neighbouring logits are far apart, as in a trained model.
    "initializer_range": 0.2,
}


def write_checkpoint(
    folder: Path, *, seed: int = 0, max_shard_size: str = "5GB", **overrides: object
) -> None:
    """Write a random model, TINY but for `overrides`, with a byte-level tokenizer."""
    config = {**TINY, **overrides}
    write_random_checkpoint(folder, config, seed=seed, max_shard_size=max_shard_size)
    save_tokenizer(folder, byte_tokenizer())


def reference_model(folder: Path, dtype: torch.dtype = torch.float32) -> Qwen3MoeForCausalLM:
    """The judge: transformers on the same checkpoint."""
    return Qwen3MoeForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def reference_decode(
    model: Qwen3MoeForCausalLM, prompt_ids: Sequence[int], num_new: int
) -> tuple[list[int], torch.Tensor]:
    """Greedy continuation of one prompt, and the logits [num_new, V] it was taken from."""
    ids = torch.tensor([list(prompt_ids)])
    result = model.generate(
        ids,
        # Not left to be guessed: it would mask any 0 in the prompt as padding.
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    return result.sequences[0, len(prompt_ids) :].tolist(), torch.cat(result.logits).float()


def save_tokenizer(folder: Path, tokenizer: Tokenizer, **config: object) -> Path:
    """Write tokenizer.json, to be used as it is, and return its path.

    `config` replaces keys of tokenizer_config.json.
    """
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    config = {"tokenizer_class": "TokenizersBackend"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def byte_tokenizer() -> Tokenizer:
    """One token for each byte: 256 ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
