"""Train the demo checkpoint: a small Qwen3-MoE on the text that every Python installation carries.

    python -m janus_bench.train_demo --output DIR [--preset demo] [--minutes 36] [--threads 1]
        [--seed 0]

`--preset routing` trains a model of more layers and experts, to record routing from.

The text is the standard library's source, docstrings included, and the topics of `pydoc`; one file
in twenty is held out, chosen by a hash of its name. A byte-level BPE tokenizer and the model are
trained on the rest. The load-balancing loss is weak on purpose: real models route unevenly, and so
does this one.

Shapes: B sequences, T tokens. The schedule follows the clock, so that the learning rate has come
down to zero when the minutes are over, whatever the machine.
"""

import copy
import math
import pydoc_data.topics
import sys
import sysconfig
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from janus_bench.report import check_output
from janus_server.bounds import Between, Threads
from janus_server.cli import run
from janus_server.command_line import parse

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 2048
CONTEXT = 320
"""Tokens of a training sequence."""
BATCH = 8
PEAK_LEARNING_RATE = 2.5e-3
WARM_UP = 0.02
"""Share of the training time in which the learning rate rises."""
Preset = Literal["demo", "routing"]
PRESETS: dict[Preset, dict[str, int]] = {
    "demo": {"num_hidden_layers": 4, "num_experts": 32, "num_experts_per_tok": 4},
    "routing": {"num_hidden_layers": 6, "num_experts": 64, "num_experts_per_tok": 8},
}
"""What differs between the models. They have 6 M and 16 M parameters, most of them in experts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """Train the demo checkpoint, or a model to record routing from."""

    output: str
    """Folder to write."""

    preset: Preset = "demo"
    """Model shape."""

    minutes: Annotated[float, Between(0.001, 10_000)] = 36.0
    """Time to train."""

    threads: Threads = 1
    """CPU threads."""

    seed: Annotated[int, Between(0, 2**62)] = 0
    """Seed of the weights and of the order of the texts."""


def command(argv: Sequence[str]) -> int:
    """Train, judge and write the checkpoint."""
    config = parse(TrainingConfig, argv, prog="python -m janus_bench.train_demo")
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    check_output("output", str(folder / "config.json"))
    torch.manual_seed(config.seed)
    torch.set_num_threads(config.threads)
    training, held_out = read_corpus()
    tokenizer = train_tokenizer(training)
    model = Qwen3MoeForCausalLM(model_config(tokenizer, PRESETS[config.preset]))
    model.set_experts_implementation("grouped_mm")
    tokens_N = encode(tokenizer, training)
    seen = train(model, tokens_N, seconds=60 * config.minutes)
    save(model, tokenizer, folder)
    bits_per_byte, skew = judge(model, tokenizer, held_out)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"parameters: {millions:.2f} M; tokens seen: {seen / 1e6:.2f} M")
    print(f"held-out bits per byte: {bits_per_byte:.3f}")
    print("busiest expert against the mean, by layer:", " ".join(f"{x:.2f}" for x in skew))
    return 0


def read_corpus() -> tuple[list[str], list[str]]:
    """Texts to train on, and texts held out."""
    library = Path(sysconfig.get_path("stdlib"))
    topics = pydoc_data.topics.topics
    texts: dict[str, str] = {f"topic {name}": text for name, text in topics.items()}
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        # These are not of the standard library, or are generated tables.
        if {"site-packages", "pydoc_data", "encodings", "lib2to3"} & set(name.parts):
            continue
        try:
            texts[name.as_posix()] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few test files are broken on purpose
    held_out = {name for name in texts if zlib.crc32(name.encode()) % 20 == 0}
    return (
        [text for name, text in texts.items() if name not in held_out],
        [text for name, text in texts.items() if name in held_out],
    )


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Byte-level BPE; id 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def model_config(tokenizer: Tokenizer, shape: dict[str, int]) -> Qwen3MoeConfig:
    """The model's values; `shape` is one of PRESETS."""
    end = end_of_text_id(tokenizer)
    values: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "moe_intermediate_size": 48,
        "intermediate_size": 768,
        "norm_topk_prob": True,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "router_aux_loss_coef": 1e-3,
        "output_router_logits": True,
        "bos_token_id": end,
        "eos_token_id": end,
        **shape,
    }
    return Qwen3MoeConfig(**values)


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """The id that ends a text."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    assert end is not None, "the trainer was told to include it"
    return end


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> torch.Tensor:
    """All texts in a row, int64 [N], each ended by the end token."""
    end = end_of_text_id(tokenizer)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(list(texts)):
        ids += [*encoding.ids, end]
    return torch.tensor(ids)


def train(model: Qwen3MoeForCausalLM, tokens_N: torch.Tensor, *, seconds: float) -> int:
    """Train until the time is over; returns the number of tokens seen."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    start, steps, loss = time.monotonic(), 0, 0.0
    with tqdm(total=round(seconds), unit="s", desc="training") as bar:
        while (elapsed := time.monotonic() - start) < seconds:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(elapsed / seconds)
            first_B = torch.randint(len(tokens_N) - CONTEXT, (BATCH,))
            x_BT = torch.stack([tokens_N[first : first + CONTEXT] for first in first_B.tolist()])
            with torch.autocast("cpu", torch.bfloat16):
                output = model(x_BT, labels=x_BT)
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            loss = output.loss.item() if steps == 1 else 0.98 * loss + 0.02 * output.loss.item()
            bar.set_postfix(steps=steps, loss=f"{loss:.3f}", refresh=False)
            bar.update(round(elapsed) - bar.n)
    return steps * BATCH * CONTEXT


def learning_rate(progress: float) -> float:
    """Linear warm-up, then a cosine down to zero; `progress` from 0 to 1."""
    if progress < WARM_UP:
        return PEAK_LEARNING_RATE * (progress + 1e-3) / WARM_UP
    return PEAK_LEARNING_RATE * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))) / 2


@torch.inference_mode()
def judge(
    model: Qwen3MoeForCausalLM, tokenizer: Tokenizer, texts: Sequence[str]
) -> tuple[float, list[float]]:
    """Bits per byte of held-out text, and per layer how often the busiest expert is used.

    The latter is a multiple of the mean over the experts.
    """
    model.eval()
    sample = "\n".join(texts)[:600_000]
    tokens_N = torch.tensor(tokenizer.encode(sample).ids)
    counts = torch.zeros(model.config.num_hidden_layers, model.config.num_experts)
    nats = 0.0
    num_bytes = 0
    for chunk_BT in tokens_N[: len(tokens_N) // 512 * 512].view(-1, 512).split(16):
        output = model(chunk_BT)
        logprobs = torch.log_softmax(output.logits[:, :-1].float(), dim=-1)
        nats -= logprobs.gather(2, chunk_BT[:, 1:, None]).sum().item()
        num_bytes += sum(len(tokenizer.decode(row).encode()) for row in chunk_BT[:, 1:].tolist())
        for layer, logits in enumerate(output.router_logits):
            chosen = logits.topk(model.config.num_experts_per_tok).indices
            counts[layer] += torch.bincount(chosen.flatten(), minlength=counts.shape[1])
    skew = (counts.max(dim=1).values / counts.mean(dim=1)).tolist()
    return nats / math.log(2) / num_bytes, skew


def save(model: Qwen3MoeForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a Hugging Face model folder in bf16."""
    model.config.output_router_logits = False
    narrow: Any = copy.deepcopy(model)
    narrow.to(torch.bfloat16).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=model.config.max_position_embeddings,
    ).save_pretrained(folder)
    model.config.output_router_logits = True


if __name__ == "__main__":
    sys.exit(run("train_demo", command))
