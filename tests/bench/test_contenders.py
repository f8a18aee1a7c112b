"""What the bench says where a contender cannot do what it is asked."""

import contextlib
import dataclasses
import multiprocessing

import pytest

from janus_bench.contenders import Contender, ContenderConfig
from janus_server.errors import JanusError
from tests.conftest import CheckpointFactory

LOCAL = ContenderConfig(name="local", checkpoint="", dtype="fp32", threads=1)


@pytest.mark.e2e
def test_a_contender_that_fails_says_why(make_checkpoint: CheckpointFactory) -> None:
    config = dataclasses.replace(
        LOCAL,
        name="transformers",
        checkpoint=str(make_checkpoint()),
        experts_implementation="by_hand",
    )
    with contextlib.closing(Contender(config)) as contender:
        sentence = "the contender transformers failed: ValueError: .*by_hand"
        with pytest.raises(JanusError, match=sentence):
            contender.run([[1, 2]], 2)


@pytest.mark.e2e
def test_a_contender_that_was_killed_is_named() -> None:
    with contextlib.closing(Contender(LOCAL)) as contender:
        [process] = multiprocessing.active_children()
        process.kill()
        with pytest.raises(JanusError, match="the contender local failed: its process has ended"):
            contender.run([[1, 2]], 2)
