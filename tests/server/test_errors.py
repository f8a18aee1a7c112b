import pytest

from janus_server.errors import ConfigError, sentence_of


def test_a_sentence_is_one_line_whatever_it_quotes() -> None:
    error = ConfigError("there is no host a\nb\x1b[31mc\udcff, für alle")
    assert str(error) == "there is no host a\\nb\\x1b[31mc\\udcff, für alle"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ConfigError("no"), "no"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError(2, "No such file or directory", "a\nb"), "No such file or directory: 'a\\nb'"),
        (MemoryError(), "there is no memory left"),
        (ExceptionGroup("", [KeyError(1), ConfigError("no")]), "no"),
        (TimeoutError(), None),
        (RuntimeError("a fault"), None),
        (ExceptionGroup("", [KeyError(1)]), None),
    ],
)
def test_what_a_user_is_told(error: BaseException, sentence: str | None) -> None:
    assert sentence_of(error) == sentence


def test_a_system_without_threads_is_one_sentence() -> None:
    assert "no thread can be started" in (sentence_of(RuntimeError("can't start new thread")) or "")
