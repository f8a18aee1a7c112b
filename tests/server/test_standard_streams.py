import io
import subprocess
import sys

import pytest

from janus_server.standard_streams import write_any_character

PROGRAM = """
import os, sys
from janus_server.standard_streams import open_closed_streams, say
open_closed_streams()
say("hello")
with open(os.devnull) as first:
    print("standard:", first.fileno() < 3, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("redirection", "expected"),
    [
        ("<&-", "standard: False\n"),
        (">&-", "standard: False\n"),
        ("<&- >&-", "standard: False\n"),
        ("2>&-", ""),
        (
            ">/dev/full",
            "hello (standard output cannot be written: No space left on device)\nstandard: False\n",
        ),
    ],
)
def test_output_that_goes_nowhere_is_no_error(redirection: str, expected: str) -> None:
    child = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {redirection}', sys.executable, PROGRAM],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (child.returncode, child.stderr) == (0, expected)


def test_a_reader_that_left_is_no_error() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", f"import time\ninput()\n{PROGRAM}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    child.stdout.close()
    _, errors = child.communicate("\n", timeout=60)
    assert child.returncode == 0
    assert errors.startswith("hello (standard output cannot be written: Broken pipe)")


def test_a_character_that_the_terminal_lacks_is_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    write_any_character()
    sys.stdout.write("caf\u00e9 \u2192")
    sys.stdout.flush()
    assert written.getvalue() == b"caf\xe9 \\u2192"
