import json
from pathlib import Path

import pytest

from janus_bench.offline import command
from janus_server.errors import ConfigError
from tests.conftest import CheckpointFactory
from tests.fakes.serving import run_janus


def test_lists_the_benches() -> None:
    result = run_janus("bench")
    assert result.returncode == 0
    assert "offline" in result.stdout


def test_names_the_benches_there_are() -> None:
    result = run_janus("bench", "online")
    assert result.returncode == 1
    assert result.stderr == "janus: there is no bench 'online'; there are: offline, schedule\n"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--dtypes", "fp8"], "--dtypes must be of bf16, fp32, not fp8"),
        (["--dtypes"], "--dtypes and --batches each need a value"),
        (["--batches"], "--dtypes and --batches each need a value"),
        (["--new-tokens", "1"], "--new-tokens must be at least 2, not 1"),
        (["--prompt-tokens", "1020"], "are 1084 together, more than the model's context of 1024"),
        (["--output", "/"], "--output: cannot write /: Is a directory"),
        (["--output", "/nowhere/x.json"], "--output: cannot write /nowhere/x.json: No such file"),
    ],
)
def test_refuses_with_a_sentence(
    flags: list[str], sentence: str, make_checkpoint: CheckpointFactory
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        command(["--checkpoint", str(make_checkpoint()), *flags])


@pytest.mark.e2e
def test_all_contenders_give_the_same_tokens(
    make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    output = tmp_path / "result.json"
    flags = "--batches 1 3 --prompt-tokens 9 --new-tokens 5 --rounds 1 --dtypes fp32"
    folder = str(make_checkpoint())
    paths = ("--checkpoint", folder, "--output", str(output))
    result = run_janus("bench", "offline", *paths, *flags.split(), timeout=110)
    assert result.returncode == 0, result.stderr
    written = json.loads(output.read_text())
    assert {"commit", "device", "command", "versions"} <= written["environment"].keys()
    rows = written["results"]
    contenders = ["transformers grouped_mm", "transformers eager", "local", "gloo", "gloo 2 lanes"]
    assert [(row["batch"], row["contender"]) for row in rows] == [
        (batch, contender) for batch in (1, 3) for contender in contenders
    ]
    assert all(row["same_tokens_as_local"] == 1.0 for row in rows)
    assert all(row["decode_tokens_per_s"] > 0 for row in rows)
    assert "local" in result.stdout
