"""The ways in which a running server is ended, and what its operator reads of each."""

import fcntl
import os
import pty
import re
import signal
import socket
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.conftest import CheckpointFactory
from tests.fakes.serving import JANUS, START_S, STOP_S, Served, request, serving

pytestmark = pytest.mark.e2e

SENTENCE = re.compile(r"[\d-]+ [\d:,]+ (WARNING|ERROR) \w+ janus_server\.[\w.]+: .+|janus: .+")
"""A line that Janus wrote, not Python, gRPC or the C++ runtime."""


@pytest.fixture(scope="module")
def folder(make_checkpoint: CheckpointFactory) -> Path:
    return make_checkpoint()


@contextmanager
def under_load(folder: Path) -> Iterator[tuple[Served, grpc.Call]]:
    """A server with two expert workers in the middle of four requests, and one of them."""
    flags = ("--expert-workers", "2", "--comm-timeout-s", "1", "--drain-timeout-s", "0.2")
    with serving(folder, *flags) as server:
        calls = [server.stub.Generate(request([1, 2, 3], 900), timeout=60) for _ in range(4)]
        for call in calls:
            next(call)
        yield server, calls[0]


def last_words(server: Served) -> tuple[int, str]:
    """How the server ends on its own: its status, and the last line, each being a sentence."""
    family = server.family()
    _, stderr = server.process.communicate(timeout=STOP_S)
    assert psutil.wait_procs(family, timeout=10)[1] == []
    lines = stderr.splitlines()
    assert [line for line in lines if not SENTENCE.fullmatch(line)] == []
    return server.process.returncode, lines[-1] if lines else ""


def member(server: Served, module: str) -> psutil.Process:
    return next(
        process for process in server.family() if f"janus_server.{module}" in process.cmdline()
    )


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("controller", "controller"),
        ("attention", "attention worker"),
        ("experts", "expert worker"),
        ("endpoint", "endpoint"),
    ],
)
def test_a_killed_process_ends_the_server_with_a_sentence(
    folder: Path, module: str, name: str
) -> None:
    with under_load(folder) as (server, call):
        victim = member(server, module)
        victim.kill()
        with pytest.raises(grpc.RpcError) as raised:
            list(call)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        assert last_words(server) == (
            1,
            f"janus: the {name} (pid {victim.pid}) was killed by SIGKILL, as the kernel does where "
            "memory runs out",
        )


@pytest.mark.parametrize(
    ("module", "name"), [("attention", "attention worker"), ("experts", "expert worker")]
)
def test_a_worker_that_is_stopped_is_named_and_killed(folder: Path, module: str, name: str) -> None:
    with under_load(folder) as (server, _):
        victim = member(server, module)
        victim.suspend()
        status, last = last_words(server)
        assert (status, last.count(";")) == (1, 1)
        killed = f"killed: the {name} (pid {victim.pid})"
        assert last.endswith(f"; stopped by a signal or a debugger, and {killed}")


def test_a_signal_after_a_failure_makes_no_orderly_end_of_it(folder: Path) -> None:
    with under_load(folder) as (server, _):
        other = member(server, "attention")
        member(server, "experts").suspend()
        other.wait(20)
        server.process.terminate()
        status, last = last_words(server)
        assert status == 1
        assert last.startswith("janus: the ")


def signal_all(server: Served, number: signal.Signals) -> None:
    """As systemd does it; the parent comes last, which is the hardest order."""
    for process in reversed(server.family()):
        process.send_signal(number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_is_an_orderly_end(folder: Path, number: signal.Signals) -> None:
    with serving(folder, "--expert-workers", "2") as server:
        calls = [server.stub.Generate(request([1, 2, 3], 900), timeout=60) for _ in range(2)]
        deltas = [[next(call)] for call in calls]
        signal_all(server, number)
        status = None
        while status is None:
            try:
                list(server.stub.Generate(request([1], 1), timeout=60))
            except grpc.RpcError as error:
                status = error.code()
        assert status is grpc.StatusCode.UNAVAILABLE
        for call, of_call in zip(calls, deltas, strict=True):
            of_call += call
            assert sum(len(delta.token_ids) for delta in of_call) == 900
            assert call.code() is grpc.StatusCode.OK
        assert last_words(server) == (0, "")


def test_a_second_signal_to_all_processes_ends_them_at_once(folder: Path) -> None:
    with serving(folder, "--expert-workers", "2", "--drain-timeout-s", "600") as server:
        call = server.stub.Generate(request([1, 2, 3], 900), timeout=60)
        next(call)
        signal_all(server, signal.SIGTERM)
        time.sleep(0.1)
        signal_all(server, signal.SIGTERM)
        assert last_words(server) == (0, "")
        with pytest.raises(grpc.RpcError):
            list(call)


@pytest.mark.parametrize("is_draining", [True, False])
def test_a_parent_that_is_killed_leaves_no_process(folder: Path, is_draining: bool) -> None:
    """As systemd does it where the end takes too long."""
    with serving(folder, "--expert-workers", "2", "--drain-timeout-s", "600") as server:
        call = server.stub.Generate(request([1, 2, 3], 900), timeout=60)
        next(call)
        family = server.family()
        if is_draining:
            signal_all(server, signal.SIGTERM)
            time.sleep(0.1)
        server.process.kill()
        assert psutil.wait_procs(family, timeout=30)[1] == []
        with pytest.raises(grpc.RpcError):
            list(call)
        server.process.communicate()


def test_a_signal_to_a_child_is_left_to_the_parent(folder: Path) -> None:
    with serving(folder) as server:
        parent, *children = server.family()
        for child in children:
            child.terminate()
        assert server.process.stderr is not None
        lines = [server.process.stderr.readline() for _ in children]
        for child in children:
            words = f"SIGTERM does not end this process (pid {child.pid}): signal its parent "
            assert sum(f"{words}(pid {parent.pid})" in line for line in lines) == 1
        list(server.stub.Generate(request([1], 4), timeout=60))
        assert server.stop() == (0, "")


@pytest.mark.parametrize("only_parent", [True, False])
@pytest.mark.parametrize("delay_s", [0.5, 1, 2, 3])
def test_a_start_that_is_ended_says_so(folder: Path, delay_s: float, only_parent: bool) -> None:
    process = subprocess.Popen(
        [JANUS, "serve", str(folder), "--listen", "127.0.0.1:0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(delay_s)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for signalled in family[:1] if only_parent else reversed(family):
        signalled.terminate()
    _, stderr = process.communicate(timeout=STOP_S)
    assert psutil.wait_procs(family, timeout=10)[1] == []
    sentence = "janus: stopped by SIGTERM before it was ready\n"
    assert (process.returncode, stderr) in [(143, sentence), (-signal.SIGTERM, "")]


def wait_until_serving(address: str) -> None:
    deadline = time.monotonic() + START_S
    with grpc.insecure_channel(address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        request = health_pb2.HealthCheckRequest()
        while (
            check(request, timeout=START_S, wait_for_ready=True).status
            != health_pb2.HealthCheckResponse.SERVING
        ):
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_reader_that_leaves_ends_no_server(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    process = subprocess.Popen(
        [JANUS, "serve", str(folder), "--listen", address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        process.stdout.close()
        wait_until_serving(address)
        process.send_signal(signal.SIGHUP)
        _, stderr = process.communicate(timeout=STOP_S)
        assert process.returncode == 0
        assert stderr.count("standard output cannot be written") == 1
        assert stderr.count("\n") == 1
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("is_ready", [False, True])
def test_a_terminal_that_is_closed_ends_the_server_in_order(folder: Path, is_ready: bool) -> None:
    terminal, other_end = pty.openpty()
    process = subprocess.Popen(
        [JANUS, "serve", str(folder), "--listen", "127.0.0.1:0"],
        stdin=other_end,
        stdout=other_end,
        stderr=other_end,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(other_end)
    output = b""
    while (b"ready 127.0.0.1:" if is_ready else b"starting") not in output:
        output += os.read(terminal, 4096)
    children = psutil.Process(process.pid).children(recursive=True)
    os.close(terminal)
    try:
        assert process.wait(STOP_S) == (0 if is_ready else 128 + signal.SIGHUP)
        assert psutil.wait_procs(children, timeout=10)[1] == []
    finally:
        process.kill()
        process.wait()
