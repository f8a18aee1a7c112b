"""Processes started by hand, on one machine and on two: they find each other, and say who left."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import pytest

from janus_proto.v1.inference_pb2_grpc import InferenceServiceStub
from janus_server.addresses import check_can_listen, split_address
from janus_server.errors import ConfigError
from janus_server.process import announced_address
from tests.conftest import CheckpointFactory
from tests.fakes.serving import JANUS, START_S, STOP_S, request

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def folder(make_checkpoint: CheckpointFactory) -> Path:
    return make_checkpoint()


class Hosts:
    """Starts processes, on machines that a prefix of the command names, and ends them all."""

    def __init__(self, folder: Path, secret: Path) -> None:
        self._arguments = [str(folder), "--cluster-secret-file", str(secret)]
        self._processes: list[subprocess.Popen[str]] = []

    def start(self, module: str, *flags: str, prefix: Sequence[str] = ()) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*prefix, sys.executable, "-m", f"janus_server.{module}", *self._arguments, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._processes.append(process)
        return process

    def address_of(self, process: subprocess.Popen[str], dialled: str = "") -> str:
        """The HOST:PORT on which it listens, with the host under which it is dialled."""
        assert process.stdout is not None
        address = announced_address(process.stdout.readline())
        assert address is not None, self.end()
        return f"{dialled}:{split_address(address)[1]}" if dialled else address

    def end(self) -> str:
        """End them, the last to be started first; what they logged."""
        logs = ""
        for process in reversed(self._processes):
            process.terminate()
            try:
                logs += process.communicate(timeout=STOP_S)[1]
            finally:
                process.kill()
        self._processes.clear()
        return logs


@pytest.fixture
def hosts(folder: Path, tmp_path: Path) -> Iterator[Hosts]:
    secret = tmp_path / "secret"
    secret.touch(0o600)
    secret.write_text(32 * "x")
    started = Hosts(folder, secret)
    yield started
    started.end()


def generates(endpoint: str, prefix: Sequence[str] = ()) -> bool:
    """Whether a server answers, once it is ready."""
    script = (
        "import sys, grpc\n"
        "from grpc_health.v1 import health_pb2, health_pb2_grpc\n"
        "channel = grpc.insecure_channel(sys.argv[1])\n"
        "calls = health_pb2_grpc.HealthStub(channel).Watch(\n"
        f"    health_pb2.HealthCheckRequest(), timeout={START_S}, wait_for_ready=True)\n"
        "next(call for call in calls if call.status == 1)\n"
    )
    subprocess.run([*prefix, sys.executable, "-c", script, endpoint], check=True, timeout=START_S)
    command = [JANUS, "generate", "--endpoint", endpoint, "--prompt-ids", "1,2", "--max-tokens=3"]
    answer = subprocess.run([*prefix, *command], capture_output=True, timeout=START_S, check=False)
    return answer.returncode == 0


@pytest.mark.parametrize(
    ("listen", "dialled"),
    [
        ("[::1]:0", "[::1]"),
        ("localhost:0", "localhost"),
        ("0.0.0.0:0", "127.0.0.2"),
        ("[::]:0", "127.0.0.1"),
    ],
)
def test_one_machine(hosts: Hosts, listen: str, dialled: str) -> None:
    try:
        check_can_listen(listen)
    except ConfigError as error:
        pytest.skip(str(error))  # no IPv6
    pools = ("--expert-workers", "1")
    controller = hosts.address_of(hosts.start("controller", "--listen", listen, *pools), dialled)
    hosts.start("experts", "--controller", controller)
    hosts.start("attention", "--controller", controller, "--listen", listen)
    endpoint = hosts.start("endpoint", "--controller", controller, "--listen", listen)
    assert generates(hosts.address_of(endpoint, dialled))
    assert "ERROR" not in hosts.end()


def test_an_expert_worker_that_is_told_to_stop_ends_the_epoch_by_name(hosts: Hosts) -> None:
    pools = ("--expert-workers", "2")
    controller = hosts.address_of(hosts.start("controller", "--listen", "127.0.0.1:0", *pools))
    experts = [hosts.start("experts", "--controller", controller) for _ in range(2)]
    hosts.start("attention", "--controller", controller, "--listen", "127.0.0.1:0")
    endpoint = hosts.start("endpoint", "--controller", controller, "--listen", "127.0.0.1:0")
    address = hosts.address_of(endpoint)
    assert generates(address)
    call = InferenceServiceStub(grpc.insecure_channel(address)).Generate(request([1, 2], 900))
    next(call)
    experts[0].terminate()
    statuses = sorted(expert.wait(STOP_S) for expert in experts)
    assert statuses == [0, 1]
    with pytest.raises(grpc.RpcError, match="attention worker attention-0 was lost"):
        list(call)
    assert "did not end" not in (log := hosts.end())
    assert log.count(" left the epoch: it was told to stop") == 2  # says who stays
    assert (
        log.count(f"(pid {experts[0].pid}) left: it was told to stop") == 1
    )  # says the controller


@contextlib.contextmanager
def two_machines() -> Iterator[tuple[list[str], list[str]]]:
    """Prefixes of commands that run in two network namespaces, 10.77.0.1 and 10.77.0.2."""
    names = [f"janus-{os.getpid()}-{index}" for index in (1, 2)]
    prefixes = [["ip", "netns", "exec", name] for name in names]
    setup = [["ip", "netns", "add", name] for name in names]
    pair = ["ip", "link", "add", "janus1", "type", "veth", "peer", "name", "janus2"]
    setup.append([*prefixes[0], *pair, "netns", names[1]])
    for index, prefix in enumerate(prefixes, 1):
        ip, link = [*prefix, "ip"], f"janus{index}"
        setup += [
            [*ip, "addr", "add", f"10.77.0.{index}/24", "dev", link],
            [*ip, "link", "set", link, "up"],
            [*ip, "link", "set", "lo", "up"],
        ]
    try:
        for command in setup:
            try:
                subprocess.run(command, check=True, capture_output=True, timeout=10)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"no network namespaces here: {error}")
        yield prefixes[0], prefixes[1]
    finally:
        for name in names:
            with contextlib.suppress(OSError):
                subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_two_machines(hosts: Hosts) -> None:
    with two_machines() as (first, second):
        listening = ("--listen", "0.0.0.0:0")
        process = hosts.start("controller", *listening, "--expert-workers", "1", prefix=first)
        controller = hosts.address_of(process, "10.77.0.1")
        hosts.start("experts", "--controller", controller, prefix=second)
        # It reaches the controller from its loopback address, which its peers cannot dial.
        local = f"127.0.0.1:{split_address(controller)[1]}"
        own = ("--advertise-host", "10.77.0.1")
        hosts.start("attention", "--controller", local, *listening, *own, prefix=first)
        endpoint = hosts.start("endpoint", "--controller", controller, *listening, prefix=second)
        assert generates(hosts.address_of(endpoint, "10.77.0.2"), prefix=first)
        assert "ERROR" not in hosts.end()
