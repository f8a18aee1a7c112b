import pytest
import torch

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


def test_memory_that_torch_does_not_get_is_one_sentence() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert sentence_of(caught.value) == (
        "there is no memory left for 1152921504606846976 bytes more (see also ulimit -v)"
    )
    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0 has a")
    assert "no memory left for 20.50 GiB more" in (sentence_of(gpu) or "")
