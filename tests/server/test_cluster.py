"""Starts that fail. What a running cluster does is tested where real requests are sent to it."""

import asyncio
import dataclasses

import psutil
import pytest

from janus_server.cluster import running_cluster
from janus_server.comm.config import CommConfig
from janus_server.config import ServeConfig
from janus_server.controller.config import PoolConfig
from janus_server.endpoint.config import AdmissionConfig
from janus_server.errors import PeerLostError, UnavailableError
from janus_server.model.config import ModelConfig
from tests.conftest import CheckpointFactory

pytestmark = pytest.mark.e2e


@pytest.fixture
def config(make_checkpoint: CheckpointFactory) -> ServeConfig:
    return ServeConfig(
        model=ModelConfig(checkpoint=str(make_checkpoint())),
        admission=AdmissionConfig(listen="127.0.0.1:0"),
    )


async def start(config: ServeConfig) -> None:
    async with running_cluster(config):
        raise AssertionError("it started")


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def test_a_process_that_cannot_start_is_named_and_nothing_stays(config: ServeConfig) -> None:
    before = children()
    broken = dataclasses.replace(config, pools=PoolConfig(attention_workers=0))
    with pytest.raises(PeerLostError, match=r"the controller \(pid \d+\) ended with exit status 1"):
        asyncio.run(start(broken))
    assert children() == before


def test_a_start_that_takes_too_long_names_what_is_missing(config: ServeConfig) -> None:
    before = children()
    slow = dataclasses.replace(config, comm=CommConfig(startup_timeout_s=0.1))
    with pytest.raises(UnavailableError, match=r"not ready within 0\.1 s: controller \(pid \d+\)"):
        asyncio.run(start(slow))
    assert children() == before


def test_a_start_without_any_time(config: ServeConfig) -> None:
    hasty = dataclasses.replace(config, comm=CommConfig(startup_timeout_s=0.001))
    with pytest.raises(UnavailableError, match=r"within 0\.001 s: no process was started yet$"):
        asyncio.run(start(hasty))


def test_a_cancelled_start_leaves_nothing(config: ServeConfig) -> None:
    async def check() -> None:
        starting = asyncio.create_task(start(config))
        while not children() - before:
            await asyncio.sleep(0.01)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting

    before = children()
    asyncio.run(check())
    assert children() == before
