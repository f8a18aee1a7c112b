from pathlib import Path

import pytest

from janus_bench.train_demo import PRESETS, command
from janus_server.errors import ConfigError


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--minutes", "0"], "--minutes must be at least"),
        (["--minutes", "nan"], "--minutes must be at least"),
        (["--threads", "0"], "--threads must be at least 1, not 0"),
        (["--seed", "-1"], "--seed must be at least 0, not -1"),
    ],
)
def test_refuses_with_a_sentence(flags: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        command(["--output", str(tmp_path / "model"), *flags])
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("preset", PRESETS)
def test_refuses_a_file_in_the_place_of_the_folder(preset: str, tmp_path: Path) -> None:
    (tmp_path / "model").touch()
    with pytest.raises(FileExistsError):
        command(["--output", str(tmp_path / "model"), "--preset", preset])
