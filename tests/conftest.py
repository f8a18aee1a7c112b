"""Fixtures that many tests share."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as transformers_logging

from tests.fakes.checkpoints import write_checkpoint

CheckpointFactory = Callable[..., Path]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    # Several workers share two cores in many tests.
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _default_sighup() -> None:
    # A suite that runs under nohup hands its ignored SIGHUP on to the servers that it starts.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class _DrainingLoop(asyncio.SelectorEventLoop):
    """Closes a moment late.

    gRPC tells of the end of a cancelled call a little later, through any loop of the process: told
    to a loop that is closed, it ends up in the log of another test, or in a crash.
    """

    def close(self) -> None:
        if not self.is_closed():
            self.run_until_complete(asyncio.sleep(0.01))
        super().close()


class _DrainingPolicy(asyncio.DefaultEventLoopPolicy):
    _loop_factory = _DrainingLoop


@pytest.fixture(scope="session", autouse=True)
def _draining_loops() -> None:
    asyncio.set_event_loop_policy(_DrainingPolicy())


@pytest.fixture
def quiet_transformers() -> Iterator[None]:
    """Without what transformers says of odd folders."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    yield
    transformers_logging.set_verbosity(verbosity)


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFactory:
    """Write a random-weight checkpoint with these config overrides, once a session for each."""
    made: dict[str, Path] = {}

    def make(**overrides: object) -> Path:
        key = repr(sorted(overrides.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("checkpoint")
            write_checkpoint(made[key], **overrides)
        return made[key]

    return make
