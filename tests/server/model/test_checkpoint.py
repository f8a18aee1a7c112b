import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from janus_scheduler.model_spec import RopeSpec
from janus_server.errors import CheckpointError
from janus_server.model.checkpoint import Checkpoint
from janus_server.model.weights import WeightReader
from tests.conftest import CheckpointFactory
from tests.fakes.checkpoints import write_checkpoint

CPU = torch.device("cpu")


@pytest.fixture
def folder(make_checkpoint: CheckpointFactory, tmp_path: Path) -> Path:
    return Path(shutil.copytree(make_checkpoint(), tmp_path / "model"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "sharded", max_shard_size="200KB")
    return tmp_path / "sharded"


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_opens_what_transformers_wrote(folder: Path) -> None:
    spec = Checkpoint.open(folder).spec
    assert (spec.num_layers, spec.moe_layers) == (3, (0, 1, 2))
    assert (spec.num_experts, spec.top_k, spec.norm_topk_prob) == (6, 2, True)
    assert spec.rope == RopeSpec(theta=10_000.0)


def test_a_sharded_checkpoint_reads_the_same(folder: Path, sharded: Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 2
    single, many = Checkpoint.open(folder), Checkpoint.open(sharded)
    assert single.spec == many.spec
    with (
        WeightReader(single, dtype=torch.float32, device=CPU) as ours,
        WeightReader(many, dtype=torch.float32, device=CPU) as theirs,
    ):
        for name in single.tensors:
            assert torch.equal(ours.read(name), theirs.read(name))


def test_a_worker_opens_only_the_shards_of_its_own_tensors(sharded: Path) -> None:
    checkpoint = Checkpoint.open(sharded)
    name = "model.layers.2.mlp.experts.5.down_proj.weight"
    for tensor in checkpoint.tensors.values():
        if tensor.path != checkpoint.tensors[name].path:
            tensor.path.unlink(missing_ok=True)
    with WeightReader(checkpoint, dtype=torch.bfloat16, device=CPU) as reader:
        assert reader.read(name).dtype == torch.bfloat16


@pytest.mark.parametrize(("eos", "expected"), [(None, ()), (3, (3,)), ([3, 5], (3, 5))])
def test_end_tokens_of_generation_config_win(
    folder: Path, eos: object, expected: tuple[int, ...]
) -> None:
    edit_config(folder, eos_token_id=7)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    assert Checkpoint.open(folder).spec.eos_token_ids == (expected or (7,))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("eos", [256, -1, True, 1.0, "1", [1, 256], {}])
def test_end_tokens_outside_the_vocabulary(folder: Path, name: str, eos: object) -> None:
    (folder / "generation_config.json").write_text("{}")
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": eos}))
    sentence = f"eos_token_id in {path} must be token ids below the vocabulary's 256, not "
    with pytest.raises(CheckpointError, match=re.escape(sentence + json.dumps(eos))):
        Checkpoint.open(folder)


def test_null_is_absent_and_absent_is_the_default(folder: Path) -> None:
    before = Checkpoint.open(folder).spec
    path = folder / "config.json"
    defaults = dict.fromkeys(["head_dim", "rms_norm_eps", "decoder_sparse_step", "mlp_only_layers"])
    path.write_text(json.dumps(json.loads(path.read_text()) | defaults))
    assert Checkpoint.open(folder).spec == before
    edit_config(folder, **defaults, max_position_embeddings=None)
    assert Checkpoint.open(folder).spec == dataclasses.replace(before, max_context=32_768)


@pytest.mark.parametrize("name", ["missing", "long" * 100, "zero\0"])
def test_no_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint folder at"):
        Checkpoint.open(tmp_path / name)


def test_an_empty_path_is_not_the_current_folder() -> None:
    with pytest.raises(CheckpointError, match="the path of the checkpoint is empty"):
        Checkpoint.open("")


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json: No such file"):
        Checkpoint.open(tmp_path)


def test_config_that_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        Checkpoint.open(folder)


def test_config_nested_too_deeply(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="not valid JSON"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("model_type", ["llama", ["qwen3_moe"], None])
def test_unknown_family(folder: Path, model_type: object) -> None:
    edit_config(folder, model_type=model_type)
    sentence = f"model_type {json.dumps(model_type)}; served are qwen3_moe"
    with pytest.raises(CheckpointError, match=re.escape(sentence)):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_size": None}, "has no 'hidden_size'"),
        ({"hidden_size": "64"}, 'hidden_size must be a whole number from 1 to .*, not "64"'),
        ({"hidden_size": True}, "hidden_size must be a whole number from 1 to .*, not true"),
        ({"hidden_size": 2, "head_dim": None}, "head_dim must be a whole number from 1 .*, not 0"),
        ({"head_dim": -16}, "head_dim must be a whole number from 1 to .*, not -16"),
        ({"head_dim": 15}, "head_dim must be even, not 15"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers must be .* from 1 to 512, not 10{12}$"),
        ({"num_local_experts": 10**12}, "num_local_experts must be .* from 1 to 1024, not 10{12}$"),
        ({"max_position_embeddings": 1}, "max_position_embeddings must be .* from 2 to .*, not 1$"),
        ({"max_position_embeddings": 10**12}, "must be .* from 2 to 1048576, not 10{12}$"),
        ({"mlp_only_layers": 3}, "mlp_only_layers must be a list of whole numbers, not 3"),
        ({"mlp_only_layers": ["1"]}, "mlp_only_layers must be a list of whole numbers, not"),
        ({"mlp_only_layers": [0], "intermediate_size": None}, "has no 'intermediate_size'"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step must be a whole number from 1 to"),
        ({"decoder_sparse_step": 4}, "leave no layer with experts"),
        ({"rms_norm_eps": "small"}, 'rms_norm_eps must be a number from 0 to 1, not "small"'),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number from 0 to 1, not NaN"),
        ({"norm_topk_prob": "yes"}, 'norm_topk_prob must be true or false, not "yes"'),
        ({"rope_parameters": [1]}, r"rope_parameters must be an object, not \[1\]"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_theta must be a number from 1 to"),
        ({"rope_parameters": {"rope_theta": float("inf")}}, "rope_theta must be .*, not Infinity"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9, more than num_local_experts 6"),
        ({"num_key_value_heads": 3}, "is no multiple of num_key_value_heads 3"),
        ({"hidden_act": "gelu"}, 'hidden_act "gelu" is not served'),
        ({"use_sliding_window": True}, "use_sliding_window true is not served, only false"),
    ],
)
def test_config_that_cannot_be_served(
    folder: Path, changes: dict[str, object], sentence: str
) -> None:
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=sentence):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": 32}, {"moe_intermediate_size": 16}, {"num_attention_heads": 2}],
)
def test_config_that_contradicts_the_tensors(folder: Path, changes: dict[str, object]) -> None:
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=r"config\.json and tensors disagree: model\."):
        Checkpoint.open(folder)


def test_config_with_more_experts_than_there_are(folder: Path) -> None:
    edit_config(folder, num_local_experts=8)
    with pytest.raises(CheckpointError, match=r"lacks 18 of the .* first being .*experts\.6\."):
        Checkpoint.open(folder)


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00004.safetensors").unlink(missing_ok=True)
    next(iter(sorted(sharded.glob("*.safetensors")))).unlink()
    with pytest.raises(CheckpointError, match=r"the shard model-0000.* is missing"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize(
    "name",
    [
        "../a.safetensors",
        "/a.safetensors",
        "a\0.safetensors",
        "\ud800.safetensors",
        "..",
        "",
        3,
        None,
        ["a.safetensors"],
        "a" * 300 + ".safetensors",
        "weights.bin",
    ],
)
def test_shard_that_is_no_file_of_the_folder(sharded: Path, name: object) -> None:
    index = sharded / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match="must name safetensors files beside it, not "):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": "a.safetensors"}'])
def test_index_without_a_map(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="has no weight_map from tensors to"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("keep", [0, 4, 100, 20_000])
def test_truncated_safetensors(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        Checkpoint.open(folder)


def test_no_pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="other weight formats are not read"):
        Checkpoint.open(folder)


def test_integer_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="stored as I8; F32, BF16 and F16 are read"):
        Checkpoint.open(folder)


def test_the_same_tensor_in_two_shards(sharded: Path) -> None:
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    tensors = load_file(first)
    name = min(tensors)
    save_file(load_file(second) | {name: tensors[name] + 1}, second)
    with pytest.raises(CheckpointError, match=f'.* and .* both hold "{re.escape(name)}"$'):
        Checkpoint.open(sharded)


def test_an_index_beside_a_single_file(folder: Path, sharded: Path) -> None:
    shutil.copy(folder / "model.safetensors", sharded)
    with pytest.raises(CheckpointError, match=r"has both model\.safetensors and model\.safeten"):
        Checkpoint.open(sharded)


def test_an_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds an adapter \(adapter_config\.json\)"):
        Checkpoint.open(folder)


def test_the_head_counts_though_the_index_does_not_name_it(sharded: Path) -> None:
    edit_config(sharded, tie_word_embeddings=True)
    index = sharded / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    del value["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(value))
    assert not Checkpoint.open(sharded).spec.tied_embeddings


@pytest.mark.parametrize("other", ["norm.weight", "model.model.norm.weight"])
def test_the_same_tensor_in_two_spellings(folder: Path, other: str) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | {other: torch.zeros(64)}, path)
    sentence = f"holds both model.norm.weight and {other}, one tensor twice"
    with pytest.raises(CheckpointError, match=re.escape(sentence)):
        Checkpoint.open(folder)


def test_a_path_that_is_not_utf_8(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not UTF-8: .*b\\udcff$"):
        Checkpoint.open(folder.rename(folder.with_name(os.fsdecode(b"b\xff"))))
