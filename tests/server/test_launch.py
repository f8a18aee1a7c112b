import dataclasses
import sys
from pathlib import Path

import psutil
import pytest

from janus_proto.v1 import control_pb2
from janus_server.config import ServeConfig
from janus_server.errors import CheckpointError, ConfigError
from janus_server.launch import command, describe_worker, startup_progress
from janus_server.model.config import ModelConfig
from tests.conftest import CheckpointFactory


def test_a_ready_worker_in_words() -> None:
    worker = control_pb2.Worker(
        worker_id="attention-0",
        role=control_pb2.WORKER_ROLE_ATTENTION,
        address="127.0.0.1:4567",
        pid=123,
    )
    assert describe_worker(worker) == (
        "attention worker attention-0 ready (pid 123, 127.0.0.1:4567)"
    )


def test_a_ready_worker_without_address_in_words() -> None:
    worker = control_pb2.Worker(worker_id="expert-1", role=control_pb2.WORKER_ROLE_EXPERT, pid=124)
    assert describe_worker(worker) == "expert worker expert-1 ready (pid 124)"


@pytest.mark.parametrize("transport", ["gloo", "local"])
def test_no_progress_bar_without_a_terminal(
    transport: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ServeConfig(model=ModelConfig(checkpoint="x"))
    assert not sys.stderr.isatty()
    with startup_progress(dataclasses.replace(config, transport=transport)) as advance:
        advance()
    assert capsys.readouterr() == ("", "")


def test_nothing_starts_on_a_broken_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        command([str(tmp_path)])


def test_nothing_starts_on_a_wrong_flag() -> None:
    with pytest.raises(ConfigError, match="--lanes must be at least 1, not 0"):
        command(["somewhere", "--lanes", "0"])


def test_nothing_starts_where_the_kv_cache_does_not_fit(make_checkpoint: CheckpointFactory) -> None:
    before = psutil.Process().children(recursive=True)
    arguments = [str(make_checkpoint()), "--listen", "127.0.0.1:0", "--kv-cache-gib", "65536"]
    with pytest.raises(ConfigError, match=r"attention worker needs .* KV cache 65,536 GiB"):
        command(arguments)
    assert psutil.Process().children(recursive=True) == before
