import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st

from janus_server.attention.config import AttentionConfig, EngineConfig
from janus_server.bounds import Between
from janus_server.comm.config import CommConfig
from janus_server.command_line import parse, to_argv
from janus_server.config import ServeConfig
from janus_server.controller.config import ControllerConfig, PoolConfig
from janus_server.endpoint.config import AdmissionConfig
from janus_server.errors import ConfigError
from janus_server.model.config import ModelConfig
from janus_server.process import ProcessConfig

texts = st.text(st.characters(exclude_characters="\0")) | st.sampled_from(
    ["", "-", "--", "-x", "--switch", "--words=x", "a b", "two\nlines", "None", "a=b", "x y=--z"]
)
numbers = st.integers(-10, 10)
amounts = st.floats(-10, 10)


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    """A part with a field of each kind."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """Text by position."""
    on: bool = True
    """A switch that is on."""
    off: bool = False
    """A switch that is off."""
    words: tuple[str, ...] = ("by", "default")
    """Texts."""
    ids: Annotated[tuple[int, ...], Between(-10, 10)] = ()
    """Whole numbers."""
    shares: Annotated[tuple[float, ...], Between(-10, 10)] = (0.5,)
    """Numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    """All kinds of fields."""

    inner: Inner
    number: Annotated[int, Between(-10, 10)] = 1
    """A whole number."""
    maybe: Annotated[int | None, Between(-10, 10)] = 5
    """A whole number, or none."""
    amount: Annotated[float, Between(-10, 10)] = 0.5
    """A number."""
    word: str = "word"
    """A text."""
    choice: Literal["a", "b-c"] = "a"
    """A choice."""


inners = st.builds(
    Inner,
    checkpoint=texts,
    on=st.booleans(),
    off=st.booleans(),
    words=st.lists(texts, max_size=3).map(tuple),
    ids=st.lists(numbers, max_size=3).map(tuple),
    shares=st.lists(amounts, max_size=3).map(tuple),
)
outers = st.builds(
    Outer,
    inner=inners,
    number=numbers,
    maybe=st.none() | numbers,
    amount=amounts,
    word=texts,
    choice=st.sampled_from(["a", "b-c"]),
)


@settings(deadline=None)
@given(config=outers)
def test_a_config_survives_the_way_through_a_command_line(config: Outer) -> None:
    assert parse(Outer, to_argv(config), prog="p") == config


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--words", "a", "b", "--number", "1", "x"], ("a", "b")),
        (["x", "--words=a", "--words=--b"], ("a", "--b")),
        (["x", "--words", "a", "--words", "b"], ("a", "b")),
        (["x", "--words"], ()),
        (["--words=a", "--", "x"], ("a",)),
        (["x"], ("by", "default")),
    ],
)
def test_a_flag_of_many_values(argv: list[str], words: tuple[str, ...]) -> None:
    config = parse(Outer, argv, prog="p")
    assert (config.inner.checkpoint, config.inner.words) == ("x", words)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--number", "11"], "--number must be at most 10, not 11"),
        (["--number=-11"], "--number must be at least -10, not -11"),
        (["--maybe", "11"], "--maybe must be at most 10, not 11"),
        (["--amount", "nan"], "--amount must be at least -10, not nan"),
        (["--amount", "inf"], "--amount must be at most 10, not inf"),
        (["--ids", "1", "11"], "--ids must be at most 10, not 11"),
        (["--ids", "1", "x"], "--ids must be numbers, not 1 x"),
        (["--shares=1", "--shares=1e300"], r"--shares must be at most 10, not 1e\+300"),
    ],
)
def test_numbers_out_of_bounds(argv: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"^{sentence}$"):
        parse(Outer, ["x", *argv], prog="p")


def test_a_worker_that_is_started_by_hand_checks_its_numbers() -> None:
    argv = ["folder", "--controller", "localhost:1", "--block-size", "0"]
    with pytest.raises(ConfigError, match="--block-size must be at least 1, not 0"):
        parse(AttentionConfig, argv, prog="p")


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


@pytest.mark.parametrize("key", ['word = "a\\u0000b"', 'words = ["a", "\\u0000"]'])
def test_a_file_holds_no_text_that_no_flag_can_have(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=r"the key words? has a NUL character"):
        parse(Outer, ["x", "--config", write(tmp_path, key)], prog="p")


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
        ("lanes = 1\nlanes = 2", "is not valid TOML"),
        ("lanes = [2]", "the key lanes must be a whole number"),
        ("lanes = {a = 2}", "the key lanes must be a whole number"),
        ("lanes = true", "the key lanes must be a whole number"),
        ('lanes = "2"', "the key lanes must be a whole number"),
        ("lanes = 2.0", "the key lanes must be a whole number"),
        ("lanes = 2020-01-01", "the key lanes must be a whole number"),
        ('kv_cache_gib = "1"', "the key kv_cache_gib must be a number"),
        ("kv_cache_gib = false", "the key kv_cache_gib must be a number"),
        ("transport = 1", "the key transport must be one of gloo, local"),
        ('log_level = "loud"', "the key log_level must be one of debug, info, warning, error"),
        ("checkpoint = 3", "the key checkpoint must be a string"),
        ('"a\\nb" = 3', r"there is no key a\\nb$"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=sentence) as caught:
        parse(ServeConfig, ["x", "--config", path], prog="p")
    assert path in str(caught.value)


def test_a_number_out_of_bounds_in_a_file(tmp_path: Path) -> None:
    path = write(tmp_path, "lanes = 0")
    with pytest.raises(ConfigError, match="--lanes must be at least 1, not 0"):
        parse(ServeConfig, ["x", "--config", path], prog="p")


def test_keys_of_many_values(tmp_path: Path) -> None:
    path = write(tmp_path, 'words = ["a", "--b"]\nshares = [1, 2.5]\nids = []\nmaybe = 3')
    config = parse(Outer, ["x", "--config", path], prog="p")
    assert (config.inner.words, config.inner.shares, config.inner.ids, config.maybe) == (
        ("a", "--b"),
        (1.0, 2.5),
        (),
        3,
    )
    assert parse(Outer, ["x", "--config", path, "--words=c"], prog="p").inner.words == ("c",)
    for text in ("words = 5", 'words = "a"', "words = [5]", "words = [true]"):
        with pytest.raises(ConfigError, match="words must be a list, and each of its elements a"):
            parse(Outer, ["x", "--config", write(tmp_path, text)], prog="p")


def test_the_command_line_wins_over_a_switch_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "off = true\non = false")
    config = parse(Outer, ["x", "--config", path, "--no-off"], prog="p")
    assert (config.inner.on, config.inner.off) == (False, False)


def test_a_boolean_key_wants_a_boolean(tmp_path: Path) -> None:
    path = write(tmp_path, 'lifeline = "yes"')
    with pytest.raises(ConfigError, match="lifeline must be true or false"):
        parse(ControllerConfig, ["x", "--config", path], prog="p")


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = write(tmp_path, "\ufefflanes = 2")
    assert parse(ServeConfig, ["x", "--config", path], prog="p").engine.lanes == 2


def test_the_checkpoint_is_no_flag() -> None:
    for argv in (["--checkpoint", "x"], ["--checkpoint=x"], ["x", "--checkpoint", "x"]):
        with pytest.raises(ConfigError, match="--checkpoint is no flag: the checkpoint is given"):
            parse(ServeConfig, argv, prog="p")


def test_a_checkpoint_that_is_not_given_by_position_is_a_flag() -> None:
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Flagged:
        """As `janus demo` has it."""

        checkpoint: str = "bundled"
        """A folder."""

    assert parse(Flagged, ["--checkpoint", "x"], prog="p").checkpoint == "x"
    assert to_argv(Flagged(checkpoint="x")) == ["--checkpoint=x"]


def test_a_missing_file_and_a_missing_path() -> None:
    with pytest.raises(ConfigError, match=r"cannot read /nope\.toml"):
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


@pytest.mark.parametrize("argv", [["--help"], ["--no-such-flag"], ["x", "--choice", "z"]])
def test_help_and_complaints_end_on_a_terminal_of_one_column(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "1")
    with pytest.raises(SystemExit):
        parse(Outer, argv, prog="p")
    assert "".join(capsys.readouterr())
