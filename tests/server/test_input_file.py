"""Files that would block, never end or fill the memory are refused with one sentence."""

import contextlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from janus_server.command_line import parse
from janus_server.config import ServeConfig
from janus_server.controller.placement import read_placement
from janus_server.endpoint.tokenizer_file import checked_tokenizer
from janus_server.errors import CheckpointError, ConfigError, JanusError
from janus_server.input_file import read_file, read_json
from janus_server.model.checkpoint import Checkpoint
from tests.conftest import CheckpointFactory
from tests.fakes.checkpoints import write_checkpoint


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path.name)  # a whole path may be too long for a socket


def link_to_fifo(path: Path) -> None:
    os.mkfifo(path.with_name("a_fifo"))
    path.symlink_to("a_fifo")


def link_to_endless_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def write_nothing(path: Path) -> None:
    path.touch()


def write_zeros(path: Path) -> None:
    path.write_bytes(bytes(10_000))


def write_far_too_much(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**36)  # takes no room on the disk


ODD_FILES: dict[Callable[[Path], None], str] = {
    make_fifo: r"is a pipe \(FIFO\), not a regular file$",
    link_to_fifo: r"is a pipe \(FIFO\), not a regular file$",
    make_socket: "is a socket, not a regular file$",
    Path.mkdir: "is a directory, not a regular file$",
    link_to_endless_device: "is a device, not a regular file$",
    link_to_nothing: "cannot read .*: No such file",
    link_to_itself: "cannot read .*: Too many levels of symbolic links",
    write_nothing: r"is not (valid|a whole|a usable)",
    write_zeros: r"is not (valid|a whole|a usable)",
    write_far_too_much: r"is larger than the \d+ MiB that are read|is not a whole",
}


def open_checkpoint(path: Path) -> None:
    checked_tokenizer(Checkpoint.open(path.parent))


def open_config(path: Path) -> None:
    parse(ServeConfig, ["--config", str(path)], prog="p")


def open_placement(path: Path) -> None:
    read_placement(path, 5)


READERS: dict[str, Callable[[Path], None]] = {
    "config.json": open_checkpoint,
    "generation_config.json": open_checkpoint,
    "model.safetensors": open_checkpoint,
    "model.safetensors.index.json": open_checkpoint,
    "tokenizer.json": open_checkpoint,
    "tokenizer_config.json": open_checkpoint,
    "added_tokens.json": open_checkpoint,
    "janus.toml": open_config,
    "placement.json": open_placement,
}


@pytest.fixture
def folder(make_checkpoint: CheckpointFactory, tmp_path: Path) -> Iterator[Path]:
    yield Path(shutil.copytree(make_checkpoint(), tmp_path / "model"))
    shutil.rmtree(tmp_path / "model")


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("make", ODD_FILES, ids=lambda make: make.__name__)
def test_an_odd_file_is_refused_wherever_it_stands(
    folder: Path, make: Callable[[Path], None], name: str
) -> None:
    path = folder / name
    path.unlink(missing_ok=True)
    if name == "model.safetensors.index.json":
        (folder / "model.safetensors").unlink()  # one or the other
    make(path)
    if name == "janus.toml" and make is write_nothing:
        return  # no keys, no complaint
    with pytest.raises(JanusError, match=ODD_FILES[make]) as refused:
        READERS[name](path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("make", [make_fifo, Path.mkdir], ids=lambda make: make.__name__)
def test_an_odd_shard_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    write_checkpoint(tmp_path / "model", max_shard_size="200KB")
    shard = min((tmp_path / "model").glob("*.safetensors"))
    shard.unlink()
    make(shard)
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(shard))} is a .*not a regular"):
        Checkpoint.open(tmp_path / "model")


def test_a_file_may_have_just_the_most_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 2**20)
    assert len(read_file(path, ConfigError, max_bytes=2**20)) == 2**20
    path.write_bytes(b"x" * (2**20 + 1))
    with pytest.raises(ConfigError, match="is larger than the 1 MiB that are read of such a file"):
        read_file(path, ConfigError, max_bytes=2**20)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', 'the key "c" stands twice in one object'),
        ("[" * 100_000, "not valid JSON"),
        ('{"a":' * 100_000, "not valid JSON"),
        ("9" * 10_000, "not valid JSON: Exceeds the limit"),
        ('"\udcff"', "not valid JSON"),
        ("{}{}", "not valid JSON: Extra data"),
    ],
)
def test_text_that_is_no_json(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=sentence):
        read_json(path, CheckpointError)


@pytest.mark.parametrize("depth", range(700, 1000, 10))
def test_a_value_near_the_greatest_depth_is_refused_too(folder: Path, depth: int) -> None:
    config = json.loads((folder / "config.json").read_text())
    text = json.dumps(config | {"hidden_size": "deep"}).replace('"deep"', "[" * depth + "]" * depth)
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"hidden_size must be|not valid JSON"):
        Checkpoint.open(folder)
