import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from janus_bench.record_routing import Routing, command, load, middles, record, skew, write
from janus_bench.routing_traces import read_routing
from janus_server.errors import CheckpointError, ConfigError, JanusError
from tests.fakes.checkpoints import byte_tokenizer, reference_model, write_checkpoint

TEXTS = [[7, 200, 31, 5, 99], [12] * 3, list(range(40, 60))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routed")
    # Layer 1 has a dense FFN.
    write_checkpoint(folder, mlp_only_layers=[1])
    return folder


def test_records_what_transformers_reports(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "routing"  # a name without a suffix stays as it is
    write(record(load(checkpoint), TEXTS), path)
    with np.load(path) as file:
        routing = dict(file)
    assert {name: (array.dtype.name, array.shape) for name, array in routing.items()} == {
        "layers": ("int32", (2,)),
        "topk_ids": ("uint8", (2, 28, 2)),
        "sequence": ("int32", (28,)),
        "num_experts": ("int32", ()),
    }
    assert routing["layers"].tolist() == [0, 2]
    assert routing["num_experts"] == 6
    assert routing["sequence"].tolist() == [0] * 5 + [1] * 3 + [2] * 20
    assert routing["topk_ids"].max() < 6
    assert (routing["topk_ids"][..., 0] != routing["topk_ids"][..., 1]).all()
    model = reference_model(checkpoint)
    for index, ids in enumerate(TEXTS):
        logits = model(torch.tensor([ids]), output_router_logits=True).router_logits
        expected = torch.stack(
            [logits_TE.topk(2).indices for logits_TE in logits if logits_TE is not None]
        )
        ours = routing["topk_ids"][:, routing["sequence"] == index]
        assert ours.tolist() == expected.tolist()


def test_the_command_writes_what_a_placement_is_made_of(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "trace"
    text.write_text("enough")
    flags = ["--text", str(text), "--sequences", "1", "--tokens", "5"]
    assert command([str(checkpoint), "--output", str(output), *flags]) == 0
    assert read_routing(output).layers[2].shape == (5, 2)
    assert "layer 2: busiest expert at" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--text", "nowhere.txt"], "cannot read nowhere.txt: No such file"),
        (["--text", "latin1.txt"], "latin1.txt is not UTF-8"),
        (["--text", "short.txt"], "only 0 texts have 128 tokens; 64 were asked for"),
        (["--tokens", "4096"], "--tokens is 4096, more than the model's context of 1024"),
        *(
            ([f"--{n}", "0"], f"--{n} must be at least 1")
            for n in ("tokens", "sequences", "threads")
        ),
        (["--text", "short.txt", "--output", "./short.txt"], "--output must be none of the files"),
        (["--output", "."], "--output: cannot write .: Is a directory"),
        (["--output", "no/where.npz"], "--output: cannot write no/where.npz: No such file"),
    ],
)
def test_refuses_with_a_sentence_before_the_model_is_loaded(
    flags: list[str],
    sentence: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin1.txt").write_bytes(b"caf\xe9")
    Path("short.txt").write_text("short")
    with pytest.raises(ConfigError, match=f"^{re.escape(sentence)}"):
        command([str(checkpoint), "--output", "trace.npz", *flags])
    assert not Path("trace.npz").exists()


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_refuses_a_folder_without(missing: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    (folder / missing).unlink()
    with pytest.raises(JanusError, match=re.escape(str(folder))):
        command([str(folder), "--output", str(tmp_path / "trace.npz")])


def test_many_experts_need_two_bytes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, num_experts=300)
    topk_ids = record(load(tmp_path), TEXTS).topk_ids
    assert topk_ids.dtype == np.uint16
    assert 256 <= topk_ids.max() < 300


def test_a_model_without_routers_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, mlp_only_layers=[0, 1, 2])
    with pytest.raises(CheckpointError, match="no router"):
        record(load(tmp_path), TEXTS)


def test_the_middles_of_the_texts_that_are_long_enough() -> None:
    tokenizer: Tokenizer = byte_tokenizer()
    ids = {char: tokenizer.encode(char).ids[0] for char in "bcdfgh"}
    texts = ["abcd", "x", "efghi", "long enough too"]
    assert middles(tokenizer, texts, 2, 2) == [[ids["b"], ids["c"]], [ids["f"], ids["g"]]]
    with pytest.raises(ConfigError, match="only 3 texts have 2 tokens; 4 were asked for"):
        middles(tokenizer, texts, 4, 2)


def test_skew_of_a_tiny_case() -> None:
    routing = Routing(
        layers=np.array([0, 1], np.int32),
        topk_ids=np.array([[[0, 1], [0, 2]], [[0, 1], [2, 3]]], np.uint8),
        sequence=np.zeros(2, np.int32),
        num_experts=4,
    )
    # Loads 2 1 1 0 and 1 1 1 1; the mean is 1.
    assert skew(routing) == [2.0, 1.0]
