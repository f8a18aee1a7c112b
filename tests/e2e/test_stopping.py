"""The ways in which a running server is ended, and what its operator reads of each."""

import signal
import socket
import subprocess
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.conftest import CheckpointFactory
from tests.fakes.serving import JANUS, START_S, STOP_S

pytestmark = pytest.mark.e2e


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


def test_a_reader_that_leaves_ends_no_server(make_checkpoint: CheckpointFactory) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    process = subprocess.Popen(
        [JANUS, "serve", str(make_checkpoint()), "--listen", address],
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
