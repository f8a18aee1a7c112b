"""Record which experts a trained checkpoint routes real text to.

    python -m janus_bench.record_routing CHECKPOINT --output FILE.npz [--text FILE ...]
        [--sequences 64] [--tokens 128] [--threads 1]

transformers runs the checkpoint in fp32 (eager attention and experts) over texts that `train_demo`
holds out, or over those of `--text`: the middle `--tokens` tokens of each text, as one sequence.
Shorter texts are skipped. The experts are the router's own choice.

Format: a compressed npz with

    layers       int32 [L]       indices of the MoE layers, ascending
    topk_ids     uint8 [L, N, K] logical experts, highest router logit first; uint16 above 256
                                 experts
    sequence     int32 [N]       which text a token belongs to; tokens in reading order
    num_experts  int32           E, of each layer

Shapes: L MoE layers, N tokens of all texts, K experts of a token, E experts, T tokens of one text.
"""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from janus_bench.report import check_output
from janus_bench.train_demo import read_corpus
from janus_server.bounds import Between, Threads
from janus_server.cli import run
from janus_server.command_line import parse
from janus_server.endpoint.tokenizer_file import checked_tokenizer
from janus_server.errors import CheckpointError, ConfigError
from janus_server.input_file import read_file
from janus_server.model.checkpoint import Checkpoint

ROUTER = re.compile(r"\.layers\.(\d+)\.mlp\.gate$")
"""The name of a router, where transformers returns (logits, weights, ids) from it."""
_MAX_TEXT_BYTES = 2**26
"""The tokenizer holds a hundred bytes for each token of a text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """What the file holds; see the module's docstring."""

    layers: NDArray[np.int32]
    """[L]"""
    topk_ids: NDArray[np.uint8 | np.uint16]
    """[L, N, K]"""
    sequence: NDArray[np.int32]
    """[N]"""
    num_experts: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordingConfig:
    """Record which experts a checkpoint routes text to, and say how uneven the routing is."""

    checkpoint: Annotated[str, tyro.conf.arg(metavar="PATH_TO_CHECKPOINT"), tyro.conf.Positional]
    """Hugging Face model folder."""

    output: str
    """Routing trace (.npz) to write."""

    text: tuple[str, ...] = ()
    """Text files to run; none: held-out source code."""

    sequences: Annotated[int, Between(1, 2**20)] = 64
    """Texts to run."""

    tokens: Annotated[int, Between(1, 2**20)] = 128
    """Tokens of each text."""

    threads: Threads = 1
    """CPU threads."""


def command(argv: Sequence[str]) -> int:
    """Record one checkpoint, write the file and say how uneven the routing is."""
    config = parse(RecordingConfig, argv, prog="python -m janus_bench.record_routing")
    if os.path.realpath(config.output) in map(os.path.realpath, config.text):
        raise ConfigError("--output must be none of the files of --text")
    check_output("output", config.output)
    torch.set_num_threads(config.threads)
    token_ids = _token_ids(config)
    routing = record(load(Path(config.checkpoint)), token_ids)
    write(routing, Path(config.output))
    for layer, factor in zip(routing.layers, skew(routing), strict=True):
        print(f"layer {layer}: busiest expert at {factor:.2f} times the mean")
    return 0


def _token_ids(config: RecordingConfig) -> list[list[int]]:
    """What to run; raises JanusError where checkpoint or texts cannot be used."""
    checkpoint = Checkpoint.open(config.checkpoint)
    if config.tokens > checkpoint.spec.max_context:
        raise ConfigError(
            f"--tokens is {config.tokens}, more than the model's context of "
            f"{checkpoint.spec.max_context}"
        )
    tokenizer = checked_tokenizer(checkpoint)
    if tokenizer is None:
        path = checkpoint.path / "tokenizer.json"
        raise CheckpointError(f"cannot read {path}: No such file or directory")
    texts = [_text(Path(path)) for path in config.text] or read_corpus()[1]
    return middles(tokenizer, texts, config.sequences, config.tokens)


def _text(path: Path) -> str:
    try:
        return read_file(path, ConfigError, max_bytes=_MAX_TEXT_BYTES).decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8") from None


def middles(
    tokenizer: Tokenizer, texts: Sequence[str], num_texts: int, num_tokens: int
) -> list[list[int]]:
    """The middle `num_tokens` token ids of the first `num_texts` texts that are long enough.

    Raises ConfigError where there are fewer.
    """
    found: list[list[int]] = []
    for text in texts:
        if len(found) == num_texts:
            break
        ids = tokenizer.encode(text).ids
        if len(ids) >= num_tokens:
            first = (len(ids) - num_tokens) // 2
            found.append(ids[first : first + num_tokens])
    if len(found) < num_texts:
        raise ConfigError(
            f"only {len(found)} texts have {num_tokens} tokens; {num_texts} were asked for"
        )
    return found


def load(folder: Path) -> Any:
    """The checkpoint as transformers runs it, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        local_files_only=True,
    )
    return model.eval()


@torch.inference_mode()
def record(model: Any, token_ids: Sequence[Sequence[int]]) -> Routing:
    """Run the texts one by one and keep what the routers choose."""
    chosen: dict[int, list[torch.Tensor]] = {}
    num_experts: set[int] = set()

    def keep(
        layer: int,
        _router: torch.nn.Module,
        _inputs: tuple[torch.Tensor],
        output: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    ) -> None:
        logits_TE, _, topk_ids_TK = output
        chosen[layer].append(topk_ids_TK)
        num_experts.add(logits_TE.shape[-1])

    handles = []
    for name, module in model.named_modules():
        if match := ROUTER.search(name):
            layer = int(match[1])
            chosen[layer] = []
            handles.append(module.register_forward_hook(partial(keep, layer)))
    if not handles:
        raise CheckpointError("the model has no router at layers.*.mlp.gate")
    for ids in tqdm(token_ids, unit="text"):
        model(torch.tensor([list(ids)]), use_cache=False)
    for handle in handles:
        handle.remove()
    assert len(num_experts) == 1, "every layer has as many experts"
    (count,) = num_experts
    layers = sorted(chosen)
    topk_ids_LNK = torch.stack([torch.cat(chosen[layer]) for layer in layers]).numpy()
    lengths = [len(ids) for ids in token_ids]
    return Routing(
        layers=np.array(layers, np.int32),
        topk_ids=topk_ids_LNK.astype(np.uint8 if count <= 256 else np.uint16),
        sequence=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        num_experts=count,
    )


def write(routing: Routing, path: Path) -> None:
    """Write the npz file."""
    with path.open("wb") as file:  # to a path, NumPy would add a suffix
        np.savez_compressed(
            file,
            layers=routing.layers,
            topk_ids=routing.topk_ids,
            sequence=routing.sequence,
            num_experts=np.int32(routing.num_experts),
        )


def skew(routing: Routing) -> list[float]:
    """For each layer, how often the busiest expert is used, as a multiple of the mean."""
    loads = [np.bincount(ids.ravel(), minlength=routing.num_experts) for ids in routing.topk_ids]
    return [float(load.max() / load.mean()) for load in loads]


if __name__ == "__main__":
    sys.exit(run("record_routing", command))
