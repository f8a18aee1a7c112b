import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from janus_server.model.checkpoint import Checkpoint
from janus_server.model.fingerprint import fingerprint
from janus_server.model.stored_tensors import FileVersion, StoredTensor
from tests.conftest import CheckpointFactory
from tests.fakes.checkpoints import write_checkpoint
from tests.fakes.model_specs import SMALL_SPEC


@pytest.fixture
def folder(make_checkpoint: CheckpointFactory, tmp_path: Path) -> Path:
    return Path(shutil.copytree(make_checkpoint(), tmp_path / "model"))


@pytest.fixture
def large(tmp_path: Path) -> StoredTensor:
    path = tmp_path / "hole.safetensors"
    path.touch()
    os.truncate(path, 2**36)  # takes no room on the disk, and would take minutes to read
    version = FileVersion.of(path.stat())
    return StoredTensor(
        path=path, version=version, dtype="BF16", shape=(2**35,), start=0, num_bytes=2**36
    )


def of(folder: Path) -> str:
    return Checkpoint.open(folder).fingerprint()


def test_a_copy_has_the_same_in_shards_of_other_sizes_too(folder: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "sharded", max_shard_size="200KB")
    os.utime(folder / "model.safetensors", (0, 0))
    assert of(folder) == of(tmp_path / "sharded")


def test_a_change_of_any_tensor_changes_it(folder: Path, large: StoredTensor) -> None:
    def of_a_large_checkpoint() -> str:
        tensors = Checkpoint.open(folder).tensors
        return fingerprint(SMALL_SPEC, {**tensors, "large": large})

    tensors = load_file(folder / "model.safetensors")
    seen = {of_a_large_checkpoint()}
    for name, tensor in tensors.items():
        # Training in bf16 may move a small part of the values only.
        generator = torch.Generator().manual_seed(0)
        moved = torch.rand(tensor.shape, generator=generator) < 0.02
        moved.view(-1)[0] |= not moved.any()
        save_file(tensors | {name: tensor + moved}, folder / "model.safetensors")
        seen.add(of_a_large_checkpoint())
    assert len(seen) == len(tensors) + 1


def test_a_change_of_one_value_of_a_small_checkpoint_changes_it(folder: Path) -> None:
    before = of(folder)
    tensors = load_file(folder / "model.safetensors")
    largest = max(tensors.values(), key=torch.numel)
    assert largest.nbytes > 20_000
    largest.view(-1)[largest.numel() // 2 + 7] += 1
    save_file(tensors, folder / "model.safetensors")
    assert of(folder) != before


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"eos_token_id": 3}),
        ("generation_config.json", {"eos_token_id": 3}),
        ("config.json", {"rms_norm_eps": 1e-5}),
        ("config.json", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ],
)
def test_a_change_of_answers_changes_it(
    folder: Path, file: str, changes: dict[str, object]
) -> None:
    before = of(folder)
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(values | changes))
    assert of(folder) != before


def test_keys_and_tensors_that_change_no_answer_do_not_count(folder: Path) -> None:
    before = of(folder)
    config = json.loads((folder / "config.json").read_text()) | {"transformers_version": "1"}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors") | {"unused": torch.ones(3)}
    save_file(tensors, folder / "model.safetensors")
    assert of(folder) == before


def test_little_of_a_large_tensor_is_read(large: StoredTensor) -> None:
    before = fingerprint(SMALL_SPEC, {"large": large})
    with large.path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"1")
    assert fingerprint(SMALL_SPEC, {"large": large}) != before
