import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from janus_server.errors import ConfigError
from janus_server.model.memory import UNLIMITED, MemoryNeeds, check_fits, free_memory, together

GIB = 2**30
MIB = 2**20
UNLIMITED_V1 = "9223372036854771712"

sizes = st.integers(0, 2**50)
needs_lists = st.lists(
    st.builds(
        MemoryNeeds,
        name=st.just("worker"),
        weights=sizes,
        kv_cache=sizes,
        working_buffers=sizes,
        process=sizes,
    ),
    min_size=1,
    max_size=5,
)


def machine(root: Path, files: Mapping[str, str], *, available_gib: float = 20.0) -> Path:
    """A tree with /proc and /sys of a machine that has so much memory available."""
    kib = int(available_gib * MIB)
    meminfo = f"MemTotal: 99999999 kB\nMemAvailable: {kib} kB\nHugePages_Total: 0\n"
    for name, text in {"proc/meminfo": meminfo, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def v1(group: str, *, limit: str, usage: int, cached: int = 0) -> dict[str, str]:
    folder = f"sys/fs/cgroup/memory/{group}"
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{usage}\n",
        f"{folder}/memory.stat": f"cache 1\ntotal_inactive_file {cached}\ntotal_active_file 0\n",
    }


def v2(group: str, *, limit: str, usage: int, cached: int = 0, high: str = "max") -> dict[str, str]:
    folder = f"sys/fs/cgroup/{group}"
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.high": f"{high}\n",
        f"{folder}/memory.current": f"{usage}\n",
        f"{folder}/memory.stat": f"anon 7\ninactive_file {cached}\nactive_file 0\n",
    }


def test_without_cgroups_all_that_is_available(tmp_path: Path) -> None:
    assert free_memory(machine(tmp_path, {})) == 20 * GIB


def test_a_machine_that_does_not_say_what_is_free(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^/proc/meminfo does not say .* is /proc mounted\?$"):
        free_memory(tmp_path)


@pytest.mark.parametrize(
    ("limit", "free"),
    [("resource.RLIM_INFINITY", UNLIMITED), (str(GIB), 0), (str(8 * GIB), 6.5 * GIB)],
)
def test_what_the_limit_on_addresses_leaves(limit: str, free: int) -> None:
    source = (
        "import resource; from janus_server.model.memory import free_address_space; "
        f"resource.setrlimit(resource.RLIMIT_AS, ({limit}, resource.RLIM_INFINITY)); "
        "print(free_address_space())"
    )
    output = subprocess.run([sys.executable, "-c", source], check=True, stdout=subprocess.PIPE)
    assert int(output.stdout) == free


def test_this_machine_has_some() -> None:
    assert free_memory() > 0


@pytest.mark.parametrize(("line", "files"), [("4:cpu,memory:", v1), ("0::", v2)])
def test_the_tightest_of_nested_cgroups_counts(
    tmp_path: Path, line: str, files: Callable[..., dict[str, str]]
) -> None:
    tree = {
        "proc/self/cgroup": f"1:name=systemd:/\n{line}/outer/inner\n",
        **files("outer/inner", limit=str(9 * GIB), usage=GIB),
        **files("outer", limit=str(6 * GIB), usage=4 * GIB, cached=GIB),
        **files("", limit=str(50 * GIB), usage=10 * GIB),
    }
    assert free_memory(machine(tmp_path, tree)) == 3 * GIB
    assert free_memory(machine(tmp_path, tree, available_gib=1.5)) == 1.5 * GIB


@pytest.mark.parametrize(
    ("line", "tree"),
    [
        ("4:memory:/a", v1("a", limit=UNLIMITED_V1, usage=GIB)),
        ("0::/a", v2("a", limit="max", usage=GIB)),
    ],
)
def test_no_limit(tmp_path: Path, line: str, tree: Mapping[str, str]) -> None:
    root = machine(tmp_path, {"proc/self/cgroup": line, **tree})
    assert free_memory(root) == 20 * GIB


def test_a_container_that_sees_only_its_own_cgroup(tmp_path: Path) -> None:
    tree = v1("", limit=str(2 * GIB), usage=GIB)
    root = machine(tmp_path, {"proc/self/cgroup": "4:memory:/docker/0123\n", **tree})
    assert free_memory(root) == GIB


def test_the_unified_hierarchy_beside_the_old_ones(tmp_path: Path) -> None:
    tree = v2("unified/a", limit="max", high=str(3 * GIB), usage=GIB)
    root = machine(tmp_path, {"proc/self/cgroup": "4:memory:/\n0::/a\n", **tree})
    assert free_memory(root) == 2 * GIB


def test_a_cgroup_beyond_its_limit_has_none(tmp_path: Path) -> None:
    tree = v2("a", limit=str(GIB), usage=2 * GIB)
    assert free_memory(machine(tmp_path, {"proc/self/cgroup": "0::/a\n", **tree})) == 0


def test_where_the_system_never_overcommits(tmp_path: Path) -> None:
    root = machine(tmp_path, {"proc/sys/vm/overcommit_memory": "2\n"})
    with (root / "proc/meminfo").open("a") as meminfo:
        meminfo.write(f"CommitLimit: {5 * MIB} kB\nCommitted_AS: {2 * MIB} kB\n")
    assert free_memory(root) == 3 * GIB


def test_a_refusal_has_the_numbers_in_one_sentence() -> None:
    needs = MemoryNeeds(
        name="attention worker",
        weights=10 * GIB,
        kv_cache=3000 * GIB,
        working_buffers=12_288,
        process=300 * MIB,
    )
    with pytest.raises(ConfigError) as caught:
        check_fits([needs], free=int(21.5 * GIB), where="this machine")
    assert str(caught.value) == (
        "the attention worker needs 3,010.3 GiB (weights 10 GiB, KV cache 3,000 GiB, "
        "working buffers 12 KiB, process 300 MiB), and this machine has 21.5 GiB available"
    )


def test_processes_that_fit_only_apart() -> None:
    needs = [MemoryNeeds(name="worker", weights=3 * GIB, process=GIB)] * 3
    check_fits(needs, free=12 * GIB, where="GPU 0")
    with pytest.raises(ConfigError) as caught:
        check_fits(needs, free=11 * GIB, where="GPU 0")
    assert str(caught.value) == (
        "the 3 processes need 12 GiB (weights 9 GiB, process 3 GiB), and GPU 0 has 11 GiB available"
    )


@given(needs=needs_lists, free=sizes)
def test_refused_is_exactly_what_is_too_much(needs: list[MemoryNeeds], free: int) -> None:
    total = sum(process.total for process in needs)
    assert together("all", needs).total == total
    if total <= free:
        check_fits(needs, free=free, where="here")
    else:
        with pytest.raises(ConfigError, match="here"):
            check_fits(needs, free=free, where="here")
