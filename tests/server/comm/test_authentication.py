import asyncio
import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from janus_proto.v1 import control_pb2, worker_pb2
from janus_proto.v1.control_pb2_grpc import (
    ControlServiceStub,
    add_ControlServiceServicer_to_server,
)
from janus_proto.v1.worker_pb2_grpc import add_AttentionWorkerServiceServicer_to_server
from janus_server.attention.service import AttentionWorkerService
from janus_server.comm.authentication import (
    MIN_SECRET_BYTES,
    ClusterSecret,
    read_secret,
    start_internal_server,
)
from janus_server.comm.config import CommConfig
from janus_server.comm.control_client import ControlClient, wait_for_epoch
from janus_server.controller.config import PoolConfig
from janus_server.controller.service import ControlService
from janus_server.errors import ConfigError, UnavailableError
from tests.fakes.controller import members_of, registration

SECRET = ClusterSecret(b"a secret of this test")
GARBAGE = b"\xff" * 100
DEADLINE_S = 30


def write_secret(path: Path, content: bytes, mode: int = 0o600) -> CommConfig:
    path.write_bytes(content)
    path.chmod(mode)
    return CommConfig(cluster_secret_file=str(path))


def test_a_secret_from_a_file(tmp_path: Path) -> None:
    assert read_secret(CommConfig()) is None
    for mode in (0o600, 0o400, 0o440):
        config = write_secret(tmp_path / f"{mode}", b"a secret of this test\n", mode)
        secret = read_secret(config)
        assert secret is not None
        assert secret.metadata == SECRET.metadata


@pytest.mark.parametrize(
    ("content", "mode", "sentence"),
    [
        (b"", 0o600, "has 0 characters, fewer than 16, and can be guessed"),
        (b" \n" * 100, 0o600, "has 0 characters"),
        (b"x" * (MIN_SECRET_BYTES - 1), 0o600, "has 15 characters"),
        (b"x" * 2**21, 0o600, "is larger than the 1 MiB"),
        (b"x" * 64, 0o644, "other users may read or change the secret in"),
        (b"x" * 64, 0o602, "other users may read or change the secret in"),
        (b"x" * 64, 0o660, "other users may read or change the secret in"),
    ],
)
def test_files_that_hold_no_usable_secret(
    content: bytes, mode: int, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        read_secret(write_secret(tmp_path / "secret", content, mode))


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "nothing"):
        with pytest.raises(ConfigError, match=str(path)):
            read_secret(CommConfig(cluster_secret_file=str(path)))


def test_child_processes_read_it_from_an_inherited_file() -> None:
    program = (
        "import sys\n"
        "from janus_server.comm.authentication import read_secret\n"
        "from janus_server.comm.config import CommConfig\n"
        "print(read_secret(CommConfig(cluster_secret_file=sys.argv[1])).metadata)"
    )
    secret = ClusterSecret.generate()
    with secret.file_for_children() as file:
        number = file.fileno()
        printed = subprocess.run(
            [sys.executable, "-c", program, f"/dev/fd/{number}"],
            pass_fds=[number],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
    assert printed.strip() == str(secret.metadata)
    assert ClusterSecret.generate().metadata != secret.metadata


def test_the_secret_itself_is_never_printed() -> None:
    assert "a secret" not in repr(SECRET)
    assert "a secret" not in str(SECRET.metadata)


@contextlib.asynccontextmanager
async def internal_server(secret: ClusterSecret | None = SECRET) -> AsyncIterator[str]:
    """A controller and an attention worker on one port."""

    def add(server: grpc.aio.Server) -> None:
        add_ControlServiceServicer_to_server(control, server)
        add_AttentionWorkerServiceServicer_to_server(AttentionWorkerService(), server)

    members = members_of(PoolConfig(expert_workers=0))
    control = ControlService(members, store_address="store:1")
    server = await start_internal_server(add, ["janus.v1.ControlService"], "127.0.0.1:0", secret)
    try:
        yield server.address
    finally:
        control.close()
        await server.stop(0)


METHODS = [
    *(
        f"/{service.full_name}/{method.name}"
        for module in (control_pb2, worker_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    ),
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
]
[(KEY, TOKEN)] = SECRET.metadata
WRONG_METADATA = [
    (),
    ((KEY, ""),),
    ((KEY, TOKEN[:-1]),),
    ((KEY, TOKEN + "0"),),
    ((KEY, TOKEN.upper()),),
    (("authorization", TOKEN),),
    *([((KEY, f"{n:064x}"),) for n in (0, 2**256 - 1)]),
    ClusterSecret.generate().metadata,
]


def test_every_method_is_refused_before_its_message_is_parsed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def check() -> None:
        async with internal_server() as address, grpc.aio.insecure_channel(address) as channel:
            for method in METHODS:
                for metadata in WRONG_METADATA:
                    call = channel.unary_unary(method)
                    with pytest.raises(grpc.aio.AioRpcError) as raised:
                        await call(GARBAGE, metadata=metadata, timeout=DEADLINE_S)
                    assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED, method
                    assert "does not show the secret of this cluster" in raised.value.details()

    assert len(METHODS) == 9
    asyncio.run(check())
    [message] = caplog.messages
    assert message.startswith("refused a call of")


def test_whoever_shows_the_secret_is_served() -> None:
    async def check() -> None:
        async with internal_server() as address:
            control = ControlClient(address, SECRET)
            worker = registration(control_pb2.WORKER_ROLE_ATTENTION, holds_experts=True)
            assert await control.register(worker, timeout_s=DEADLINE_S) == "attention-0"
            assert (await wait_for_epoch(control, timeout_s=DEADLINE_S)).number == 1
            async with asyncio.timeout(DEADLINE_S):
                while not await is_ready(address):
                    control.set_ready(1)
            await control.close()

    async def is_ready(address: str) -> bool:
        async with grpc.aio.insecure_channel(address) as channel:
            watch: Any = ControlServiceStub(channel).WatchEpochs(
                control_pb2.WatchEpochsRequest(), metadata=SECRET.metadata
            )
            return (await watch.read()).workers[0].ready

    asyncio.run(check())


def test_a_process_with_another_secret_ends_with_a_sentence() -> None:
    async def check() -> None:
        async with internal_server() as address:
            for secret in (None, ClusterSecret.generate()):
                control = ControlClient(address, secret)
                worker = registration(control_pb2.WORKER_ROLE_ATTENTION, holds_experts=True)
                with pytest.raises(ConfigError, match="show the secret of this cluster"):
                    await control.register(worker, timeout_s=DEADLINE_S)
                with pytest.raises(UnavailableError, match="need the same --cluster-secret-file"):
                    await anext(control.epochs())
                await control.close()

    asyncio.run(check())


def test_a_process_with_a_secret_is_refused_where_there_is_none(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def check() -> None:
        async with internal_server(None) as address:
            control = ControlClient(address, SECRET)
            worker = registration(control_pb2.WORKER_ROLE_ATTENTION, holds_experts=True)
            for _ in range(2):
                with pytest.raises(ConfigError, match="shows a secret, but the process that it"):
                    await control.register(worker, timeout_s=DEADLINE_S)
            with pytest.raises(UnavailableError, match="need the same --cluster-secret-file"):
                await anext(control.epochs())
            await control.close()

    caplog.set_level(logging.WARNING)
    asyncio.run(check())
    assert sum(message.startswith("refused a call of") for message in caplog.messages) == 1


def test_without_a_secret_loopback_is_served_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def check() -> None:
        async with internal_server(None) as address:
            control = ControlClient(address)
            async with contextlib.aclosing(control.epochs()) as epochs:
                await anext(epochs)
            await control.close()

    caplog.set_level(logging.WARNING)
    asyncio.run(check())
    [message] = caplog.messages
    assert "every user of this machine may act as a process of this cluster" in message


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "192.0.2.1:80"])
def test_without_a_secret_nothing_listens_beyond_loopback(listen: str) -> None:
    async def check() -> None:
        await start_internal_server(lambda server: None, [], listen, None)

    with pytest.raises(ConfigError, match="without --cluster-secret-file: whoever reaches it"):
        asyncio.run(check())
