import os
import subprocess
import sys
from collections.abc import Mapping

import pytest

SERVES = """
import janus_server
import asyncio, os
from janus_server.grpc_server import start_server

async def main():
    server = await start_server(lambda grpc_server: None, [], "127.0.0.1:0")
    await server.stop(0)

asyncio.run(main())
print(os.environ["TORCH_CPP_LOG_LEVEL"])
"""


@pytest.mark.parametrize(
    ("variables", "level"),
    [
        ({"GRPC_POLL_STRATEGY": "none"}, "ERROR"),
        ({"GRPC_POLL_STRATEGY": "pol"}, "ERROR"),
        ({"TORCH_CPP_LOG_LEVEL": "INFO"}, "INFO"),
    ],
)
def test_variables_of_libraries(variables: Mapping[str, str], level: str) -> None:
    others = {key: text for key, text in os.environ.items() if key != "TORCH_CPP_LOG_LEVEL"}
    finished = subprocess.run(
        [sys.executable, "-c", SERVES],
        env={**others, **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (finished.returncode, finished.stderr, finished.stdout) == (0, "", f"{level}\n")
