import signal
import subprocess
import sys

SOURCE = "import sys, time; print(sys.argv[-1], flush=True); time.sleep(600)"


def test_a_child_that_is_interrupted_while_it_imports_says_nothing() -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "janus_server.child", "timeit", "-n1", "-r1", SOURCE],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == f"{SOURCE}\n"  # it has its own arguments
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
        assert (child.returncode, errors) == (-signal.SIGINT, "")
    finally:
        child.kill()
        child.communicate()
