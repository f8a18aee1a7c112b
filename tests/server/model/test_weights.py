import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from janus_server.errors import CheckpointError
from janus_server.model.checkpoint import Checkpoint
from janus_server.model.weights import WeightReader
from tests.conftest import CheckpointFactory

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
