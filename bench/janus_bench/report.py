"""What every result says of its origin (device, commit, command), and where results are kept."""

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from janus_server.errors import ConfigError

RESULTS = Path(__file__).parent / "results"
"""Committed results, one JSON file each."""


_LIBRARIES = ("torch", "triton", "numba", "numpy", "transformers")


def environment() -> dict[str, Any]:
    """The machine, commit and libraries of a measurement."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["janus", *sys.argv[1:]]),
        "commit": _commit(),
        "device": _cpu_model(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_count": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _LIBRARIES if find_spec(name)},
    }


def check_output(flag: str, path: str) -> None:
    """Refuse a file that cannot be written, before hours of work; "" stands for no file.

    Raises ConfigError.
    """
    if not path:
        return
    is_new = not os.path.lexists(path)
    try:
        # Without O_NONBLOCK, a FIFO that nobody reads would block the call.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK))
        if is_new:
            os.unlink(path)
    except OSError as failure:
        raise ConfigError(f"--{flag}: cannot write {path}: {failure.strerror}") from None


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result, its `environment` included, as JSON with a line for each row."""
    head = json.dumps({**result, "results": []}, indent=2)
    rows = ",\n    ".join(json.dumps(row) for row in result["results"])
    empty = '"results": []'
    path.write_text(head.replace(empty, f'"results": [\n    {rows}\n  ]') + "\n")


def _commit() -> str:
    """The commit of this source tree, marked if files differ from it; "" outside of git."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!bench/**/results")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
