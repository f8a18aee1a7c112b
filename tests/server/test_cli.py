import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from janus_server.cli import main, summarize


def test_help_introduces_and_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "Mixture-of-Experts" in text
    assert "  serve       Serve a checkpoint" in text
    assert "janus serve PATH_TO_CHECKPOINT" in text


def test_without_arguments_help_is_shown_and_the_status_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([]) == 2
    assert "usage: janus" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("janus ")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("sreve", "did you mean `janus serve`?"), ("xyzzy", "`janus --help` lists them.")],
)
def test_an_unknown_command(name: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"janus: there is no command {name!r}; {hint}\n"
    assert captured.out == ""


def test_an_error_for_users_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "/nowhere"]) == 1
    assert capsys.readouterr().err == "janus: no checkpoint folder at /nowhere\n"


@pytest.mark.parametrize("argv", [["serve", "x"], ["placement", "--help"], ["bench"], ["--help"]])
def test_every_command_needs_a_working_directory(
    argv: Sequence[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert main(argv) == 1
    sentence = "the working directory is gone; start from one that exists"
    assert capsys.readouterr() == ("", f"janus: {sentence}\n")


def test_help_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--help"])
    assert caught.value.code == 0
    assert "--expert-workers" in capsys.readouterr().out


def test_a_reader_that_leaves_is_no_error() -> None:
    program = "import sys; from janus_server.cli import main; sys.exit(main(['--help']))"
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    child.stdout.close()
    assert child.stderr.read() == b""
    assert child.wait(60) == 1
    child.stderr.close()


def run_with_full_output(*argv: str) -> subprocess.CompletedProcess[str]:
    program = f"import sys; from janus_server.cli import main; sys.exit(main({list(argv)}))"
    with open("/dev/full", "w") as full:
        return subprocess.run(
            [sys.executable, "-c", program],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )


def test_a_full_disk_is_one_sentence() -> None:
    child = run_with_full_output("--help")
    assert (child.returncode, child.stderr) == (1, "janus: No space left on device\n")


def test_a_summary_is_the_first_line_of_the_docstring() -> None:
    def command(argv: Sequence[str]) -> int:
        """Do it.

        At length.
        """
        return 0

    assert summarize("it", command) == "  it          Do it."
