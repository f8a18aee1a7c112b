"""Every key of config.json that changes what transformers computes is honoured or refused by name.

transformers is the judge on the very same folder. Where it cannot load the folder there is nothing
to agree with, and nothing is asked.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

from janus_server.errors import CheckpointError
from janus_server.model.checkpoint import Checkpoint
from tests.conftest import CheckpointFactory
from tests.fakes.checkpoints import reference_decode, reference_model
from tests.fakes.decoding import greedy_decode, local_pool

PROMPT = [5, 9, 200, 31, 77, 3, 3, 250]
NUM_NEW = 3
ODD_VALUES = [
    None,
    True,
    False,
    12,
    0.5,
    "odd",
    [],
    ["sliding_attention", "full_attention"],
    ["mlp", "full_attention"],
    {"odd": {"odd": 1}},
    {"num_experts_per_tok": "num_key_value_heads"},
]
OTHER_SPELLINGS = {"num_experts", "rope_scaling", "torch_dtype", "original_max_position_embeddings"}
"""Read while a config is made from the file, before its class can be watched."""
ROPE_KINDS = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}


class WatchedConfig(Qwen3MoeConfig):  # type: ignore[misc]
    """Remembers which attributes transformers reads, those that no class declares too."""

    def __getattribute__(self, key: str) -> Any:
        READ.add(key)
        return super().__getattribute__(key)


pytestmark = pytest.mark.usefixtures("quiet_transformers")

READ: set[str] = set()


@pytest.fixture
def folder(make_checkpoint: CheckpointFactory, tmp_path: Path) -> Path:
    source = make_checkpoint(num_hidden_layers=2, num_experts=4)
    return Path(shutil.copytree(source, tmp_path / "model"))


def edit(folder: Path, config: dict[str, Any], **changes: object) -> None:
    (folder / "config.json").write_text(json.dumps(config | changes))


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def disagreement(folder: Path, key: str) -> str | None:
    """What is wrong with how we take a folder, None where nothing is."""
    try:
        (ours,) = greedy_decode(folder, local_pool(folder, 1), [PROMPT], NUM_NEW)
    except CheckpointError as error:
        # Sizes that contradict the tensors are told by the tensor.
        named = key in str(error) or "tensors" in str(error)
        return None if named else f"refused without its name: {error}"
    try:
        token_ids, logits = reference_decode(reference_model(folder), PROMPT, NUM_NEW)
    except Exception:
        return None
    difference = ((torch.stack(ours.logits) - logits).abs().max() / logits.abs().max()).item()
    same = ours.token_ids == token_ids and difference < 1e-4
    return None if same else f"{ours.token_ids} and {token_ids} differ by {difference}"


def keys_that_transformers_reads(folder: Path) -> set[str]:
    READ.clear()
    config = WatchedConfig.from_pretrained(folder)
    model = Qwen3MoeForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    reference_decode(model, PROMPT, NUM_NEW)
    fields = {field.name for field in dataclasses.fields(Qwen3MoeConfig)}
    is_method = {name for name in READ if callable(getattr(Qwen3MoeConfig, name, None))}
    return (READ - is_method) | fields | OTHER_SPELLINGS | {"attribute_map"}


@pytest.mark.slow
@pytest.mark.parametrize("value", ODD_VALUES, ids=repr)
def test_every_key_is_honoured_or_refused_by_name(folder: Path, value: object) -> None:
    keys = keys_that_transformers_reads(folder)
    assert {"is_causal", "attention_chunk_size", "rope_parameters", "hidden_act"} <= keys
    config = read_config(folder)
    wrong = {}
    for key in sorted(keys):
        edit(folder, config, **{key: value})
        if (what := disagreement(folder, key)) is not None:
            wrong[key] = what
    assert wrong == {}


def test_an_absent_key_has_the_default_of_transformers_or_is_missed_by_name(folder: Path) -> None:
    config = read_config(folder)
    wrong = {}
    for key in config:
        edit(folder, {other: config[other] for other in config if other != key})
        if (what := disagreement(folder, key.replace("local_", ""))) is not None:
            wrong[key] = what
    assert wrong == {}


@pytest.mark.slow
@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("kind", ROPE_KINDS)
def test_every_rope_parameter_is_honoured_or_refused_by_name(
    folder: Path, kind: str, spelling: str
) -> None:
    config = read_config(folder)
    wrong = {}
    for key in sorted(RopeParameters.__annotations__.keys() | {"type"}):
        for value in (None, 0, 2.5, True, False, "odd", [1, 2], {"rope_type": "default"}):
            rope = {"rope_type": kind, **ROPE_KINDS[kind], key: value}
            edit(folder, config, **{spelling: rope})
            if (what := disagreement(folder, key if key != "rope_type" else "rope")) is not None:
                wrong[key, str(value)] = what
    assert wrong == {}


SERVED: dict[str, dict[str, Any]] = {
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4}},
    "linear_in_old_words": {"rope_scaling": {"type": "linear", "factor": 2.5}},
    "llama3": {"rope_parameters": {"rope_type": "llama3", **ROPE_KINDS["llama3"]}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", **ROPE_KINDS["yarn"]}},
    "yarn_in_old_words": {
        "rope_scaling": {"type": "yarn", **ROPE_KINDS["yarn"]},
        "rope_theta": 5e5,
    },
    "yarn_of_everything": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16,
            "original_max_position_embeddings": 256,
            "beta_fast": 20,
            "beta_slow": 2.5,
            "mscale": 0.7,
            "mscale_all_dim": 1.3,
            "truncate": False,
        }
    },
    "yarn_with_attention_factor": {
        "rope_parameters": {"rope_type": "yarn", **ROPE_KINDS["yarn"], "attention_factor": 0.5}
    },
    "yarn_factor_from_the_contexts": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": None,
            "original_max_position_embeddings": 128,
        }
    },
    "yarn_without_an_original_context": {
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0},
    },
    "rope_scaling_replaces_rope_parameters": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "rope_scaling": {"rope_type": "yarn", **ROPE_KINDS["yarn"]},
    },
    "original_context_beside_the_others": {
        "rope_parameters": {"rope_type": "yarn", **ROPE_KINDS["yarn"]},
        "original_max_position_embeddings": 512,
    },
    "theta_inside_wins": {"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 1e3},
    "theta_outside": {"rope_parameters": {"rope_type": "linear", "factor": 2}, "rope_theta": 1e3},
    "empty_rope_scaling": {"rope_scaling": {}, "rope_parameters": {"rope_theta": 1e6}},
    "rope_type_wins": {"rope_parameters": {"rope_type": "linear", "type": "yarn", "factor": 2}},
    "part_of_a_head_by_default_is_ignored": {"partial_rotary_factor": 0.5, "rope_theta": 1e3},
}


@pytest.mark.parametrize("name", SERVED)
def test_rope_is_resolved_as_transformers_does(folder: Path, name: str) -> None:
    plain = Checkpoint.open(folder).spec.rope
    config = read_config(folder)
    if "rope_parameters" not in SERVED[name]:
        del config["rope_parameters"]
    edit(folder, config, **SERVED[name])
    assert Checkpoint.open(folder).spec.rope != plain
    assert disagreement(folder, "") is None


@pytest.mark.parametrize(
    ("rope", "sentence"),
    [
        *(
            ({"rope_type": kind, "factor": 2.0}, f'rope type "{kind}" is not served, only default')
            for kind in sorted({*ROPE_INIT_FUNCTIONS, "axial", "mrope"} - set(ROPE_KINDS))
        ),
        ({"full_attention": {"rope_type": "yarn"}}, r'for some layers only \("full_attention"\)'),
        ({"rope_type": "yarn", "truncate": None}, "truncate must be true or false, not null"),
        ({"rope_type": "yarn", "rope_theta": 1}, "rope_theta must be above 1 with"),
        ({"rope_type": "linear"}, "has no 'factor'"),
        ({"rope_type": "linear", "factor": 0}, "factor must be a number from 0.001 to"),
        (
            {"rope_type": "linear", "factor": 2, "partial_rotary_factor": 0.5},
            "partial_rotary_factor 0.5 is not served with the rope type linear",
        ),
        (
            {"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4},
            "high_freq_factor 4 must be above low_freq_factor 4",
        ),
    ],
)
@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
def test_rope_that_is_not_served(
    folder: Path, spelling: str, rope: dict[str, object], sentence: str
) -> None:
    edit(folder, read_config(folder), **{spelling: rope})
    with pytest.raises(CheckpointError, match=sentence):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config .* is not served$"),
        ({"is_causal": False}, "is_causal false is not served, only true"),
        ({"per_layer_config": {"0": {"rms_norm_eps": 1e-3}}}, "per_layer_config .* not served$"),
        ({"layer_types": ["full_attention", "mlp"]}, 'layer_types .* only "full_attention"'),
        ({"attribute_map": {"top_k": "num_layers"}}, "attribute_map .* is not served$"),
    ],
)
def test_key_that_is_not_served(folder: Path, changes: dict[str, object], sentence: str) -> None:
    edit(folder, read_config(folder), **changes)
    with pytest.raises(CheckpointError, match=sentence):
        Checkpoint.open(folder)


def test_a_tied_checkpoint_with_a_head_of_its_own_uses_it(folder: Path) -> None:
    edit(folder, read_config(folder), tie_word_embeddings=True)
    assert not Checkpoint.open(folder).spec.tied_embeddings
    assert disagreement(folder, "") is None


LAYER = "model.layers.0"
UNUSED_TENSORS: dict[str, dict[str, tuple[int, ...]]] = {
    "biases": {
        f"{LAYER}.self_attn.{name}_proj.bias": (size,)
        for name, size in {"q": 64, "k": 32, "v": 32, "o": 64}.items()
    },
    "bias_of_the_gate": {
        f"{LAYER}.mlp.gate.bias": (4,),
        f"{LAYER}.mlp.gate.e_score_correction_bias": (4,),
    },
    "bias_of_the_norms": {f"{LAYER}.input_layernorm.bias": (64,), "model.norm.bias": (64,)},
    "bias_of_the_head": {"lm_head.bias": (256,)},
    "dense_part_of_a_mixture": {
        f"{LAYER}.mlp.gate_proj.weight": (96, 64),
        f"{LAYER}.mlp.up_proj.weight": (96, 64),
        f"{LAYER}.mlp.down_proj.weight": (64, 96),
    },
    "shared_expert": {
        f"{LAYER}.mlp.shared_expert.gate_proj.weight": (32, 64),
        f"{LAYER}.mlp.shared_expert_gate.weight": (1, 64),
    },
    "frequencies": {
        f"{LAYER}.self_attn.rotary_emb.inv_freq": (8,),
        "model.rotary_emb.inv_freq": (8,),
    },
    "further_layer": {"model.layers.2.input_layernorm.weight": (64,)},
    "scales": {f"{LAYER}.self_attn.q_proj.weight_scale_inv": (1, 1)},
    "nothing_at_all": {"empty": (0, 3), "scalar": ()},
}


@pytest.mark.parametrize("name", UNUSED_TENSORS)
def test_tensors_that_no_key_calls_for_are_ignored(folder: Path, name: str) -> None:
    path = folder / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    more = {
        name: torch.randn(shape, generator=generator)
        for name, shape in UNUSED_TENSORS[name].items()
    }
    save_file(load_file(path) | more, path)
    reference_model(folder)
    assert disagreement(folder, "") is None
