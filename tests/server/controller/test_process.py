"""The controller as a process of its own."""

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import psutil
import pytest

from janus_proto.v1 import control_pb2
from janus_server.comm.control_client import ControlClient, wait_for_epoch
from janus_server.command_line import to_argv
from janus_server.controller.config import ControllerConfig, PoolConfig
from janus_server.model.checkpoint import Checkpoint
from janus_server.model.config import ModelConfig
from janus_server.process import ProcessConfig, announced_address
from tests.conftest import CheckpointFactory
from tests.fakes.controller import registration

pytestmark = pytest.mark.e2e

Starter = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def model(make_checkpoint: CheckpointFactory) -> ModelConfig:
    return ModelConfig(checkpoint=str(make_checkpoint()))


@pytest.fixture
def start() -> Iterator[Starter]:
    """Start a controller with this configuration."""
    started: list[subprocess.Popen[str]] = []

    def start_controller(config: ControllerConfig) -> "subprocess.Popen[str]":
        child = subprocess.Popen(
            [sys.executable, "-m", "janus_server.controller", *to_argv(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(child)
        return child

    yield start_controller
    for child in started:
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout, child.stderr):
            pipe.close()


def test_it_forms_an_epoch_whose_store_is_there(start: Starter, model: ModelConfig) -> None:
    async def join(address: str) -> control_pb2.Epoch:
        control = ControlClient(address)
        try:
            await control.register(
                registration(
                    control_pb2.WORKER_ROLE_ATTENTION,
                    holds_experts=True,
                    model_fingerprint=Checkpoint.open(model.checkpoint).fingerprint(),
                ),
                timeout_s=30,
            )
            return await wait_for_epoch(control, timeout_s=30)
        finally:
            await control.close()

    pools = PoolConfig(attention_workers=1, expert_workers=0)
    child = start(ControllerConfig(model=model, pools=pools))
    epoch = asyncio.run(join(announced_address(child.stdout.readline())))
    assert (epoch.number, epoch.store_prefix) == (1, "epoch-1")
    host, port = epoch.store_address.split(":")
    socket.create_connection((host, int(port)), timeout=30).close()
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) == 0


@pytest.mark.parametrize(
    ("checkpoint", "sentence"),
    [("/nowhere", "no checkpoint folder at /nowhere"), (None, "cannot hold the model's 6 experts")],
)
def test_what_it_cannot_serve_is_one_sentence(
    start: Starter, model: ModelConfig, checkpoint: str | None, sentence: str
) -> None:
    if checkpoint is not None:
        model = ModelConfig(checkpoint=checkpoint)
    child = start(ControllerConfig(model=model, pools=PoolConfig(expert_slots=1)))
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 1
    assert errors.count("\n") == 1
    assert sentence in errors


def test_a_port_in_use_is_one_sentence(start: Starter, model: ModelConfig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        child = start(ControllerConfig(model=model, listen=listen))
        _, errors = child.communicate(timeout=60)
    assert child.returncode == 1
    assert f"cannot listen on {listen}: the port is in use" in errors
    assert errors.count("\n") == 1


def test_it_does_not_outlive_a_killed_parent(model: ModelConfig) -> None:
    program = """
import asyncio, sys
from janus_server.supervisor import Supervisor

async def main():
    supervisor = Supervisor(hurry=asyncio.Event())
    child = await supervisor.spawn(
        "controller", "janus_server.controller", sys.argv[1:], announces=True
    )
    await child.address()
    print(child.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""
    argv = to_argv(ControllerConfig(model=model, process=ProcessConfig(lifeline=True)))
    parent = subprocess.Popen(
        [sys.executable, "-c", program, *argv], stdout=subprocess.PIPE, text=True
    )
    orphan = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    try:
        orphan.wait(60)
    except psutil.TimeoutExpired:
        orphan.kill()
        raise
