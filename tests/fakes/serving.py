"""A real `janus serve` in a process of its own, and what a client sees of it."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil

from janus_proto.v1 import inference_pb2, worker_pb2
from janus_proto.v1.inference_pb2_grpc import InferenceServiceStub
from janus_proto.v1.worker_pb2_grpc import AttentionWorkerServiceStub
from janus_server.comm.authentication import ClusterSecret

JANUS = str(Path(sys.executable).parent / "janus")
START_S = 60
STOP_S = 40


@dataclass
class Served:
    """A running server."""

    process: subprocess.Popen[str]
    address: str
    ready_lines: list[str]
    secret: ClusterSecret

    @property
    def stub(self) -> InferenceServiceStub:
        return InferenceServiceStub(grpc.insecure_channel(self.address))

    @property
    def attention_addresses(self) -> list[str]:
        return [
            line.rpartition(", ")[2].rstrip(")")
            for line in self.ready_lines
            if line.startswith("attention worker")
        ]

    def free_blocks(self) -> tuple[int, int]:
        """(free, all) KV blocks of the first attention worker."""
        with grpc.insecure_channel(self.attention_addresses[0]) as channel:
            stub = AttentionWorkerServiceStub(channel)
            request = worker_pb2.GetEngineLoadRequest()
            load = stub.GetEngineLoad(request, metadata=self.secret.metadata, timeout=10).load
        return load.num_free_blocks, load.num_blocks

    def wait_until_idle(self) -> None:
        """Wait until all KV blocks are free."""
        deadline = time.monotonic() + 20
        while (free := self.free_blocks())[0] != free[1]:
            assert time.monotonic() < deadline, f"KV blocks are still held: {free}"
            time.sleep(0.02)

    def family(self) -> list[psutil.Process]:
        """This process and all below it."""
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def stop(self, signal_number: int = signal.SIGTERM) -> tuple[int, str]:
        """Signal the server; its exit status and standard error. Nothing may be left behind."""
        family = self.family()
        self.process.send_signal(signal_number)
        _, stderr = self.process.communicate(timeout=STOP_S)
        _, alive = psutil.wait_procs(family, timeout=10)
        assert alive == []
        return self.process.returncode, stderr


@contextlib.contextmanager
def serving(checkpoint: Path, *flags: str) -> Iterator[Served]:
    """Start `janus serve` on a free port and end it on leaving, whatever happened."""
    secret = ClusterSecret.generate()
    with secret.file_for_children() as file:
        process = _start(checkpoint, *flags, secret_fd=file.fileno())
    assert process.stdout is not None
    lines: list[str] = []
    try:
        for line in process.stdout:
            lines.append(line.rstrip())
            if line.startswith("ready "):
                break
        else:
            raise AssertionError(f"it ended before it was ready: {process.communicate()[1]}")
        yield Served(
            process=process,
            address=lines[-1].removeprefix("ready "),
            ready_lines=lines[:-1],
            secret=secret,
        )
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.communicate(timeout=STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


def _start(checkpoint: Path, *flags: str, secret_fd: int) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [
            *(JANUS, "serve", str(checkpoint), "--listen", "127.0.0.1:0", "--dtype", "fp32"),
            # All that a small model can use, however large the machine.
            *("--kv-cache-gib", "0.25", "--cluster-secret-file", f"/dev/fd/{secret_fd}", *flags),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=[secret_fd],
    )


def run_janus(*arguments: str, timeout: float = START_S) -> subprocess.CompletedProcess[str]:
    """Run one `janus` command to its end."""
    return subprocess.run(
        [JANUS, *arguments], capture_output=True, text=True, timeout=timeout, check=False
    )


def generate_json(address: str, prompt_ids: Sequence[int], *flags: str) -> dict[str, Any]:
    """`janus generate --json`."""
    ids = ",".join(map(str, prompt_ids))
    result = run_janus("generate", "--endpoint", address, "--prompt-ids", ids, "--json", *flags)
    assert result.returncode == 0, result.stderr
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def request(
    prompt_ids: Sequence[int], max_tokens: int, **sampling: Any
) -> inference_pb2.GenerateRequest:
    """A greedy request unless `sampling` says otherwise."""
    return inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=prompt_ids),
        sampling=inference_pb2.SamplingParams(
            **{"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **sampling}
        ),
    )
