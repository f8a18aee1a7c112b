import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from janus_server.attention.config import AttentionConfig, EngineConfig
from janus_server.comm.config import CommConfig
from janus_server.command_line import parse, to_argv
from janus_server.config import ServeConfig
from janus_server.controller.config import ControllerConfig, PoolConfig
from janus_server.endpoint.config import AdmissionConfig
from janus_server.errors import ConfigError
from janus_server.model.config import ModelConfig
from janus_server.process import ProcessConfig

paths = st.text(min_size=1).filter(lambda text: text != "--" and "\0" not in text)
amounts = st.floats(min_value=1e-9, max_value=1e9)


@given(checkpoint=paths, lanes=st.integers(), kv_cache_gib=amounts, lifeline=st.booleans())
def test_a_config_survives_the_way_through_a_command_line(
    checkpoint: str, lanes: int, kv_cache_gib: float, lifeline: bool
) -> None:
    config = AttentionConfig(
        model=ModelConfig(checkpoint=checkpoint, dtype="fp32"),
        engine=EngineConfig(lanes=lanes, kv_cache_gib=kv_cache_gib),
        controller="127.0.0.1:5",
        process=ProcessConfig(lifeline=lifeline),
    )
    assert parse(AttentionConfig, to_argv(config), prog="p") == config


def test_a_flag_may_follow_the_written_command_line() -> None:
    config = ControllerConfig(model=ModelConfig(checkpoint="folder"))
    parsed = parse(ControllerConfig, [*to_argv(config), "--lifeline"], prog="p")
    assert parsed == dataclasses.replace(config, process=ProcessConfig(lifeline=True))


def write(folder: Path, text: str) -> str:
    path = folder / "janus.toml"
    path.write_text(text)
    return str(path)


def test_every_serve_flag_is_a_toml_key(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        checkpoint = "somewhere"
        attention_workers = 3
        transport = "local"
        listen = "127.0.0.1:0"
        kv_cache_gib = 0.5
        lanes = 2
        comm_timeout_s = 5
        """,
    )
    assert parse(ServeConfig, ["--config", path], prog="p") == ServeConfig(
        model=ModelConfig(checkpoint="somewhere"),
        pools=PoolConfig(attention_workers=3),
        admission=AdmissionConfig(listen="127.0.0.1:0"),
        engine=EngineConfig(kv_cache_gib=0.5, lanes=2),
        comm=CommConfig(comm_timeout_s=5.0),
        transport="local",
    )


@pytest.mark.parametrize("form", [["--config", "{}"], ["--config={}"]])
def test_the_command_line_wins_over_the_file(tmp_path: Path, form: list[str]) -> None:
    path = write(tmp_path, 'checkpoint = "from-file"\nlanes = 2\nthreads = 4\n')
    argv = ["from-argv", *(part.format(path) for part in form), "--lanes", "3"]
    config = parse(ServeConfig, argv, prog="p")
    assert config.model.checkpoint == "from-argv"
    assert (config.engine.lanes, config.threads) == (3, 4)


def test_a_later_file_wins_over_an_earlier_one(tmp_path: Path) -> None:
    first = tmp_path / "first.toml"
    first.write_text('checkpoint = "a"\nlanes = 2\nthreads = 2')
    second = write(tmp_path, "lanes = 3")
    config = parse(ServeConfig, ["--config", str(first), "--config", second], prog="p")
    assert (config.engine.lanes, config.threads) == (3, 2)


@pytest.mark.parametrize(("text", "expected"), [("false", False), ("true", True)])
def test_a_boolean_key(tmp_path: Path, text: str, expected: bool) -> None:
    path = write(tmp_path, f"lifeline = {text}")
    assert parse(ControllerConfig, ["x", "--config", path], prog="p").process.lifeline is expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("lanes = ", "is not valid TOML"),
        ("lanes = " + "9" * 5000, "is not valid TOML"),
        ("lanes = " + "[" * 5000, "is not valid TOML"),
        ("lane = 2", "there is no key lane; did you mean lanes?"),
        ("zzz = 2", "there is no key zzz"),
        ("[engine]\nlanes = 2", "there is no key engine"),
        ("lanes = [2]", "the key lanes must be a plain value"),
        ("lanes = true", "the key lanes cannot be true or false"),
        ("checkpoint = 3", "the key checkpoint must be a string"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=sentence) as caught:
        parse(ServeConfig, ["x", "--config", path], prog="p")
    assert path in str(caught.value)


def test_a_boolean_key_wants_a_boolean(tmp_path: Path) -> None:
    path = write(tmp_path, 'lifeline = "yes"')
    with pytest.raises(ConfigError, match="lifeline must be true or false"):
        parse(ControllerConfig, ["x", "--config", path], prog="p")


def test_a_missing_file_and_a_missing_path() -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration /nope\.toml"):
        parse(ServeConfig, ["--config", "/nope.toml"], prog="p")
    with pytest.raises(ConfigError, match="--config needs the path"):
        parse(ServeConfig, ["x", "--config"], prog="p")


def test_what_follows_two_dashes_is_no_flag() -> None:
    assert parse(ServeConfig, ["--", "--config"], prog="p").model.checkpoint == "--config"


def test_wrong_flags_exit_with_a_complaint(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(ServeConfig, ["x", "--bogus", "1"], prog="janus serve")
    assert caught.value.code == 2
    assert "--bogus" in capsys.readouterr().err


def test_help_explains_the_config_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(ServeConfig, ["--help"], prog="janus serve")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "--config FILE.toml" in text
    assert "PATH_TO_CHECKPOINT" in text
