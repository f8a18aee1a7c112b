import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from janus_server.lifeline import END, END_COMES
from janus_server.process import announced_address

PREAMBLE = """
import asyncio, signal, sys, time
from dataclasses import dataclass, field
from janus_server import lifeline, process
from janus_server.errors import ConfigError
from janus_server.process import ProcessConfig

@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    '''A process.'''

    number: int = 1
    '''A number.'''
    process: ProcessConfig = field(default_factory=ProcessConfig)
"""

ENDING = """
process.run("test", Config, main)
"""

UNTIL_STOPPED = """
async def main(config, stop):
    process.announce(f"here:{config.number}", config.process)
    await asyncio.wait_for(stop.wait(), 60)
"""


@pytest.fixture
def start(tmp_path: Path):
    """Start a process whose `main` is in the given source."""
    started = []

    def start_process(
        main: str, *argv: str, stdout: int | IO[str] = subprocess.PIPE
    ) -> subprocess.Popen[str]:
        script = tmp_path / "script.py"
        script.write_text(PREAMBLE + main + ENDING)
        child = subprocess.Popen(
            [sys.executable, str(script), *argv],
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(child)
        return child

    yield start_process
    for child in started:
        child.kill()
        child.wait()
        for pipe in filter(None, (child.stdin, child.stdout, child.stderr)):
            pipe.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_an_orderly_stop(start, number: signal.Signals) -> None:
    child = start(UNTIL_STOPPED, "--number", "7")
    assert announced_address(child.stdout.readline()) == "here:7"
    child.send_signal(number)
    assert child.wait(60) == 0


def test_a_hangup_that_was_ignored_before_the_start_stays_ignored(start) -> None:
    child = start("signal.signal(signal.SIGHUP, signal.SIG_IGN)" + UNTIL_STOPPED)
    child.stdout.readline()
    child.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.2)
    child.terminate()
    assert child.wait(60) == 0


def test_a_closed_lifeline_is_an_orderly_stop(start) -> None:
    child = start(UNTIL_STOPPED, "--lifeline")
    child.stdout.readline()
    child.stdin.close()
    assert child.wait(60) == 0


def test_the_parents_word_is_an_orderly_stop(start) -> None:
    child = start(UNTIL_STOPPED, "--lifeline")
    child.stdout.readline()
    child.stdin.write(END.decode())
    child.stdin.flush()
    assert child.wait(60) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_with_a_lifeline_a_signal_is_left_to_the_parent(start, number: signal.Signals) -> None:
    child = start(UNTIL_STOPPED, "--lifeline")
    child.stdout.readline()
    child.send_signal(number)
    sentence = f"{number.name} does not end this process (pid {child.pid}): signal its parent"
    assert sentence in child.stderr.readline()
    assert child.poll() is None
    child.stdin.close()
    assert child.wait(60) == 0


def test_a_signal_while_the_parent_ends_needs_no_word(start) -> None:
    child = start("lifeline._PARENT_SPEAKS_S = 0.1\n" + UNTIL_STOPPED, "--lifeline")
    child.stdout.readline()
    child.send_signal(signal.SIGTERM)
    child.stdin.write(END_COMES.decode())
    child.stdin.flush()
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.5)
    child.stdin.close()
    assert (child.wait(60), child.stderr.read()) == (0, "")


def test_a_parent_that_is_gone_before_the_announcement_is_no_error(start) -> None:
    child = start(UNTIL_STOPPED, "--lifeline")
    child.stdout.close()
    child.stdin.close()
    assert (child.wait(60), child.stderr.read()) == (0, "")


def test_without_lifeline_a_closed_input_means_nothing(start) -> None:
    child = start(UNTIL_STOPPED)
    child.stdin.close()
    child.stdout.readline()
    child.terminate()
    assert child.wait(60) == 0


def test_a_process_that_does_not_stop_exits_hard_after_its_lifeline(start) -> None:
    child = start(
        """
lifeline.LIFELINE_GRACE_S = 0.1

async def main(config, stop):
    process.announce("here:1", config.process)
    time.sleep(60)
""",
        "--lifeline",
    )
    child.stdout.readline()
    child.stdin.close()
    assert child.wait(60) == 1
    assert "exiting hard" in child.stderr.read()


@pytest.mark.parametrize(
    "body",
    [
        """
async def main(config, stop):
    raise ConfigError("the moon is not full")
""",
        """
async def fail():
    raise ConfigError("the moon is not full")

async def main(config, stop):
    async with asyncio.TaskGroup() as group:
        group.create_task(fail())
""",
    ],
    ids=["raised", "in a task group"],
)
def test_an_error_for_users_is_one_sentence(start, body: str) -> None:
    child = start(body)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 1
    assert errors.count("\n") == 1
    assert "the moon is not full" in errors


@pytest.mark.parametrize(
    ("body", "status"), [("pass", 0), ('raise ConfigError("the moon is not full")', 1)]
)
def test_the_interpreters_own_exit_is_left_out(start, body: str, status: int) -> None:
    """It aborts on a thread that is inside C++ at that moment."""
    child = start(f"""
import atexit

async def main(config, stop):
    atexit.register(print, "the orderly exit")
    {body}
""")
    output, errors = child.communicate(timeout=60)
    assert (child.returncode, output) == (status, "")
    assert errors.count("\n") == status


@pytest.mark.parametrize(
    ("preparation", "sentence"),
    [
        (
            "os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone')",
            "the working directory is gone",
        ),
        (
            "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))",
            "a process may open 64 files here",
        ),
        ("resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))", "may address 1073741824 bytes"),
        (
            # Root is not bound by it.
            "resource.setrlimit(resource.RLIMIT_NPROC, (3, 3)); os.getuid() or os.setuid(23456)",
            "more can be started here (ulimit -u",
        ),
    ],
)
def test_surroundings_in_which_nothing_can_work(start, preparation: str, sentence: str) -> None:
    child = start(f"import os, resource\n{preparation}\n{UNTIL_STOPPED}")
    output, errors = child.communicate(timeout=60)
    assert (child.returncode, output) == (1, "")
    assert errors.count("\n") == 1
    assert sentence in errors


def test_the_limit_of_open_files_is_raised(start) -> None:
    child = start("""
import resource
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))

async def main(config, stop):
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    process.announce(str(limit), config.process)
""")
    assert int(announced_address(child.stdout.readline())) >= 128
    assert child.wait(60) == 0


def test_any_other_error_keeps_its_traceback(start) -> None:
    child = start("async def main(config, stop):\n    1 / 0\n")
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 1
    assert "ZeroDivisionError" in errors


def test_a_wrong_flag_exits_with_2(start) -> None:
    child = start(UNTIL_STOPPED, "--numbre", "7")
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 2
    assert "--numbre" in errors


def test_only_announcements_hold_an_address() -> None:
    assert announced_address("listening 127.0.0.1:80\n") == "127.0.0.1:80"
    assert announced_address("[Gloo] Rank 0 is connected\n") is None
