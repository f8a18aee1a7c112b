"""The memory of this machine: how much of it is free, and whether what the processes need fits.

Needs are estimates from above. On a CPU the system commits memory only as it is written, so that
too large a KV cache would be noticed by the kernel's out-of-memory killer, hours later.
"""

import resource
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from janus_server.errors import ConfigError

FP32_BYTES = 4
UNLIMITED = 2**63

PROCESS_BYTES: Mapping[str, int] = {"cpu": 512 * 2**20, "cuda": 2**30}
"""Interpreter, libraries and compiled code of one worker, by the device on which it computes. On a
CPU, workers of a small model have 160 to 330 MiB at first, and 470 once every size has run."""

_MAPPED_BYTES = 3 * 2**29
"""Addresses that a process takes beside its memory, for libraries, stacks and arenas of malloc."""

ADDRESS_SPACE = (
    "the address space of a process (ulimit -v, less "
    f"{_MAPPED_BYTES / 2**30:g} GiB for libraries and threads)"
)
"""Whose bytes `free_address_space` returns, for messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryNeeds:
    """What a process, or several, need in one memory. All in bytes."""

    name: str
    """Of the process, for messages."""
    weights: int = 0
    kv_cache: int = 0
    working_buffers: int = 0
    """What a step, or the loading of weights, needs beside them at most."""
    process: int = PROCESS_BYTES["cpu"]

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv_cache + self.working_buffers + self.process

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "KV cache": self.kv_cache,
            "working buffers": self.working_buffers,
            "process": self.process,
        }
        shown = ", ".join(f"{name} {shown_bytes(size)}" for name, size in parts.items() if size)
        return f"{shown_bytes(self.total)} ({shown})"


def together(name: str, needs: Sequence[MemoryNeeds]) -> MemoryNeeds:
    """What these need at the same time."""
    sizes = ("weights", "kv_cache", "working_buffers", "process")
    return MemoryNeeds(
        name=name, **{size: sum(getattr(need, size) for need in needs) for size in sizes}
    )


def check_fits(needs: Sequence[MemoryNeeds], *, free: int, where: str = "this machine") -> None:
    """Refuse processes that need more than `free` bytes, alone or together; raises ConfigError."""
    for need in (*needs, together(f"{len(needs)} processes", needs)):
        if need.total > free:
            verb = "needs" if need in needs else "need"
            raise ConfigError(
                f"the {need.name} {verb} {need}, and {where} has {shown_bytes(free)} available"
            )


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that processes of this machine, and of this process's cgroups, can still take.

    What the system would give up for them, such as cached files, counts as free; swap does not.
    `root` is where /proc and /sys are. Raises ConfigError where they do not say.
    """
    meminfo = _table(root / "proc/meminfo")
    if "MemAvailable:" not in meminfo:
        raise ConfigError("/proc/meminfo does not say how much memory is free; is /proc mounted?")
    free = 1024 * meminfo["MemAvailable:"]
    if _number(root / "proc/sys/vm/overcommit_memory") == 2:
        # Reserved memory counts there, written or not.
        free = min(free, 1024 * (meminfo["CommitLimit:"] - meminfo["Committed_AS:"]))
    return max(min([free, *_cgroup_rooms(root)]), 0)


def free_address_space() -> int:
    """Bytes that a process like this one can take, by its limit on addresses, from its start on."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return UNLIMITED if limit == resource.RLIM_INFINITY else max(limit - _MAPPED_BYTES, 0)


def shown_bytes(size: int) -> str:
    """A size for messages."""
    if size < 2**20:
        return f"{size / 2**10:,.0f} KiB"
    if size < 2**30:
        return f"{size / 2**20:,.0f} MiB"
    return f"{size / 2**30:,.1f}".removesuffix(".0") + " GiB"


def _cgroup_rooms(root: Path) -> Iterator[int]:
    """What each limit of a cgroup leaves, from this process's own up to the outermost in sight."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            mount, layout = root / "sys/fs/cgroup/memory", _V1
        elif not controllers:
            unified = root / "sys/fs/cgroup/unified"
            mount, layout = unified if unified.exists() else unified.parent, _V2
        else:
            continue
        # In a container the path may be the host's, whose lower part is not in sight.
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents) if group.parts else (group,):
            yield from _room(mount / folder, layout)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """Names of a cgroup's files."""

    limits: tuple[str, ...]
    usage: str
    cached: tuple[str, ...]
    """Keys of memory.stat for pages that the system would give up."""


_V1 = _Layout(
    limits=("memory.limit_in_bytes",),
    usage="memory.usage_in_bytes",
    cached=("total_inactive_file", "total_active_file"),
)
_V2 = _Layout(
    limits=("memory.max", "memory.high"),
    usage="memory.current",
    cached=("inactive_file", "active_file"),
)


def _room(folder: Path, layout: _Layout) -> Iterator[int]:
    usage = _number(folder / layout.usage)
    limits = [_number(folder / name) for name in layout.limits]
    for limit in limits:
        if limit is not None and usage is not None:
            stat = _table(folder / "memory.stat")
            yield limit - usage + sum(stat.get(key, 0) for key in layout.cached)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    """The number in a file; None where there is none, as in `max` for no limit."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _table(path: Path) -> dict[str, int]:
    """Lines of a name and a number; units are left out."""
    fields = (line.split() for line in _lines(path))
    return {field[0]: int(field[1]) for field in fields if len(field) > 1}
