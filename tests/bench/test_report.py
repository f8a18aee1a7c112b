import os
from pathlib import Path

import pytest

from janus_bench.report import check_output
from janus_server.errors import ConfigError


def test_what_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    check_output("output", "")
    check_output("output", "/dev/null")
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("kept")
    for path in (old, new):
        check_output("output", str(path))
    assert old.read_text() == "kept"
    assert not new.exists()


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        (".", "Is a directory"),
        ("nowhere/result.json", "No such file or directory"),
        ("fifo", "No such device or address"),  # nobody reads it
        ("file/result.json", "Not a directory"),
        ("x" * 300, "File name too long"),
        ("/proc/result.json", "No such file or directory"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_work(
    path: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    Path("file").touch()
    with pytest.raises(ConfigError, match=f"^--plot: cannot write .*: {reason}$"):
        check_output("plot", path)
