import math
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from janus_scheduler.activation import ActivationCosts
from janus_scheduler.placement import round_robin
from janus_server.attention.config import AttentionConfig
from janus_server.errors import CheckpointError
from janus_server.model.checkpoint import Checkpoint
from janus_server.model.config import ModelConfig
from janus_server.model.weights import WeightReader
from janus_server.monolith.config import MonolithConfig
from janus_server.monolith.worker import local_expert_pool
from tests.conftest import CheckpointFactory
from tests.fakes.decoding import local_pool
from tests.fakes.engines import load_weights
from tests.fakes.loaded_tensors import tensors_in

NAME = "model.layers.2.mlp.experts.5.down_proj.weight"


@pytest.fixture
def folder(make_checkpoint: CheckpointFactory, tmp_path: Path) -> Path:
    return Path(shutil.copytree(make_checkpoint(), tmp_path / "model"))


def spoil(folder: Path, values: Sequence[float], dtype: torch.dtype, name: str = NAME) -> None:
    """Store a tensor in `dtype`, with these values in the middle of its last row."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = tensors[name].to(dtype)
    tensors[name].view(-1)[-9 : len(values) - 9] = torch.tensor(values).to(dtype)
    save_file(tensors, path)


def read(folder: Path, dtype: torch.dtype, name: str = NAME) -> torch.Tensor:
    with WeightReader(Checkpoint.open(folder), dtype=dtype, device=torch.device("cpu")) as reader:
        return reader.read(name)


@pytest.mark.parametrize("served", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([math.nan], "nan"),
        ([math.inf], "inf"),
        ([-math.inf], "-inf"),
        ([math.inf, -math.inf], "inf"),
    ],
)
def test_values_that_are_no_numbers_are_refused(
    folder: Path, values: list[float], shown: str, stored: torch.dtype, served: torch.dtype
) -> None:
    spoil(folder, values, stored)
    sentence = (
        f"{NAME} in {folder / 'model.safetensors'} holds {shown} at [63, 23], "
        "which is no number that a model can be served with"
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(sentence)}$"):
        read(folder, served)


def test_a_value_that_the_served_format_cannot_hold_is_refused(folder: Path) -> None:
    spoil(folder, [3.4e38], torch.float32)
    sentence = "holds 3.4e+38 at [63, 23], a number beyond the range of bf16; --dtype fp32 can"
    with pytest.raises(CheckpointError, match=re.escape(sentence)):
        read(folder, torch.bfloat16)
    assert read(folder, torch.float32).max() == torch.tensor(3.4e38)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_large_values_whose_sum_overflows_are_served(folder: Path, dtype: torch.dtype) -> None:
    spoil(folder, [3e38] * 4, dtype)
    assert read(folder, dtype).max() > 2.9e38


def test_a_norm_is_looked_at_too(folder: Path) -> None:
    spoil(folder, [math.nan], torch.float32, "model.norm.weight")
    with pytest.raises(CheckpointError, match=r"^model\.norm\.weight in .* holds nan at \[55\]"):
        read(folder, torch.float32, "model.norm.weight")


def load_monolith(folder: Path) -> Any:
    model = ModelConfig(checkpoint=str(folder), dtype="fp32")
    config = MonolithConfig(attention=AttentionConfig(model=model, controller="127.0.0.1:1"))
    checkpoint = Checkpoint.open(folder)
    spec = checkpoint.spec
    placement = round_robin(moe_layers=spec.moe_layers, num_experts=spec.num_experts, num_workers=1)
    costs = ActivationCosts(expert_ps=1, pair_ps=1)
    return load_weights(folder), local_expert_pool(config, checkpoint, placement, costs)


LOADS: dict[str, Callable[[Path], Any]] = {
    "attention": load_weights,
    "experts": lambda folder: local_pool(folder, 2),
    "monolith": load_monolith,
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS.keys())
def test_what_is_written_to_the_files_later_changes_no_loaded_tensor(
    folder: Path, load: Callable[[Path], Any]
) -> None:
    path = folder / "model.safetensors"
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}

    def values(loaded: Any) -> list[torch.Tensor]:
        return [
            (tensor.to_dense() if tensor.is_mkldnn else tensor).clone()
            for tensor in tensors_in(loaded)
        ]

    loaded = load(folder)
    before = values(loaded)
    assert len(before) > 10
    path.write_bytes(b"\xff" * path.stat().st_size)  # in place, as cp does it
    for was, now in zip(before, values(loaded), strict=True):
        assert torch.equal(was, now)


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS.keys())
def test_no_file_stays_mapped(folder: Path, load: Callable[[Path], Any]) -> None:
    loaded = load(folder)
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert any(True for _ in tensors_in(loaded))


def replace_by_a_rename(path: Path) -> None:
    """By a file of the same size and times, as archives without times bring them."""
    shutil.copy2(path, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)


def write_in_place(path: Path) -> None:
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"1234")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


CHANGES = [
    replace_by_a_rename,
    write_in_place,
    lambda path: os.truncate(path, path.stat().st_size - 4),
    lambda path: os.truncate(path, 0),
    lambda path: shutil.copy(path.parent / "config.json", path),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("num_read", [0, 1])
def test_a_file_that_changes_before_its_weights_are_read_is_refused(
    folder: Path, num_read: int, change: Callable[[Path], None]
) -> None:
    checkpoint, path = Checkpoint.open(folder), folder / "model.safetensors"
    sentence = (
        f"{path} was changed or replaced after it was checked, and before all its "
        "weights were read; start again"
    )
    reader = WeightReader(checkpoint, dtype=torch.float32, device=torch.device("cpu"))

    def read_all() -> None:
        with reader:
            for index, name in enumerate(checkpoint.tensors):
                if index == num_read:
                    change(path)
                reader.read(name)

    with pytest.raises(CheckpointError, match=f"^{re.escape(sentence)}$"):
        read_all()


def test_a_file_that_is_another_for_a_while_is_not_read(folder: Path) -> None:
    checkpoint, path = Checkpoint.open(folder), folder / "model.safetensors"
    path.rename(folder / "aside")
    shutil.copy2(folder / "aside", path)
    with WeightReader(checkpoint, dtype=torch.float32, device=torch.device("cpu")) as reader:
        with pytest.raises(CheckpointError, match="was changed or replaced"):
            reader.read(NAME)
        (folder / "aside").rename(path)


def test_a_file_that_is_removed_before_its_weights_are_read_is_refused(folder: Path) -> None:
    checkpoint, path = Checkpoint.open(folder), folder / "model.safetensors"
    path.unlink()
    with (
        pytest.raises(CheckpointError, match=f"^cannot read {re.escape(str(path))}: No such file"),
        WeightReader(checkpoint, dtype=torch.float32, device=torch.device("cpu")) as reader,
    ):
        reader.read(NAME)


def test_other_uses_of_a_file_are_no_change(folder: Path) -> None:
    checkpoint, path = Checkpoint.open(folder), folder / "model.safetensors"
    with WeightReader(checkpoint, dtype=torch.float32, device=torch.device("cpu")) as reader:
        path.chmod(0o400)
        (folder / "link").hardlink_to(path)
        os.utime(path, ns=(0, path.stat().st_mtime_ns))
        reader.read(NAME)
        path.chmod(0o600)
