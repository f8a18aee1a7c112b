import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from janus_server.byte_budget import ByteBudget, Reads, Traffic

MAX_METADATA = 16 * 2**10
MAX_REQUEST = 4 * 2**20


def budget() -> ByteBudget:
    return ByteBudget(Traffic(), max_metadata_bytes=MAX_METADATA, max_request_bytes=MAX_REQUEST)


def test_headers_without_end_are_over_the_budget() -> None:
    connection = budget()
    assert connection.add(Traffic(received_bytes=MAX_METADATA, num_streams=1), num_reading=0)
    assert not connection.add(Traffic(received_bytes=300_000, num_streams=1), num_reading=0)


def test_waiting_reads_may_each_bring_a_request() -> None:
    sixty = Traffic(received_bytes=60 * MAX_REQUEST, num_streams=60)
    assert budget().add(sixty, num_reading=60)
    assert not budget().add(sixty, num_reading=50)


def test_requests_that_were_cut_off_explain_what_came_of_them() -> None:
    connection = budget()
    assert connection.add(Traffic(received_bytes=60 * 2**20, num_streams=60), num_reading=60)
    later = Traffic(received_bytes=61 * 2**20, num_streams=60, num_reads=60)
    assert connection.add(later, num_reading=0)


def test_a_quiet_past_is_no_credit() -> None:
    connection = budget()
    idle = Traffic(num_streams=1000, num_reads=1000, sent_bytes=10**9, time_s=10**5)
    assert connection.add(idle, num_reading=0)
    flood = dataclasses.replace(idle, received_bytes=300_000)
    assert not connection.add(flood, num_reading=0)


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, MAX_METADATA), max_size=20),
            st.floats(0, 1),
            st.integers(0, 20),
        ),
        max_size=20,
    )
)
def test_an_honest_client_is_never_over(steps: list[tuple[list[int], float, int]]) -> None:
    """In each step calls begin, a part of each request that is still to come arrives, reads end."""
    connection, now, to_come = budget(), Traffic(), []
    for headers, part, num_ended in steps:
        to_come += [MAX_REQUEST] * len(headers)
        arrived = [int(rest * part) for rest in to_come]
        to_come = [rest - bytes_ for rest, bytes_ in zip(to_come, arrived, strict=True)]
        num_ended = min(num_ended, len(to_come))
        now = Traffic(
            received_bytes=now.received_bytes + sum(headers) + sum(arrived),
            num_streams=now.num_streams + len(headers),
            num_reads=now.num_reads + num_ended,
        )
        del to_come[:num_ended]
        assert connection.add(now, num_reading=len(to_come))


def test_reads_of_peers_that_have_gone_are_forgotten() -> None:
    reads = Reads()
    with reads.reading("gone"), reads.reading("here"):
        pass
    with reads.reading("reading"):
        reads.forget_all_but({"here"})
    assert dict(reads.num_ended) == {"here": 1, "reading": 1}
