import time
from pathlib import Path

from janus_server.surroundings import check_threads, threads_of_process


def test_threads_that_are_started_to_count_them_end() -> None:
    threads = Path("/proc/self/task")
    num_before = len(list(threads.iterdir()))
    check_threads("this test runs", 200)
    deadline = time.monotonic() + 60
    while (num_now := len(list(threads.iterdir()))) > num_before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert num_now <= num_before


def test_a_process_that_computes_runs_more_threads() -> None:
    assert 0 < threads_of_process() < threads_of_process(1) < threads_of_process(8)
