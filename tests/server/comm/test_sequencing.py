from hypothesis import given, settings
from hypothesis import strategies as st

from janus_server.comm.sequencing import Announcement, StepLayout, StepSequencer


def test_a_step_starts_with_the_workers_that_have_work() -> None:
    sequencer = StepSequencer([0, 1])
    assert sequencer.next_step() is None
    sequencer.offer(1, Announcement.WORK, [3, 2])
    assert sequencer.next_step() == StepLayout(lane_tokens={1: (3, 2)})


def test_participants_are_awaited_and_newcomers_join_at_the_boundary() -> None:
    sequencer = StepSequencer([0, 1])
    sequencer.offer(0, Announcement.WORK, [1])
    assert sequencer.next_step() is not None
    sequencer.offer(1, Announcement.WORK, [7])
    assert sequencer.next_step() is None
    assert sequencer.awaited == {0}
    sequencer.offer(0, Announcement.WORK, [1])
    assert sequencer.next_step() == StepLayout(lane_tokens={0: (1,), 1: (7,)})


def test_an_idle_participant_is_left_out() -> None:
    sequencer = StepSequencer([0, 1])
    sequencer.offer(0, Announcement.WORK, [1])
    sequencer.offer(1, Announcement.WORK, [1])
    assert sequencer.next_step() is not None
    sequencer.offer(0, Announcement.IDLE)
    sequencer.offer(1, Announcement.WORK, [1])
    assert sequencer.next_step() == StepLayout(lane_tokens={1: (1,)})


def test_closed_when_all_have_closed() -> None:
    sequencer = StepSequencer([0, 1])
    sequencer.offer(0, Announcement.CLOSE)
    assert not sequencer.closed
    sequencer.offer(1, Announcement.CLOSE)
    assert sequencer.closed


def test_layout_of_unequal_lanes() -> None:
    layout = StepLayout(lane_tokens={0: (4,), 2: (1, 0), 3: (2, 5)})
    assert layout.num_lanes == 2
    assert layout.tokens_of(0) == [(0, 4), (2, 1), (3, 2)]
    assert layout.tokens_of(1) == [(3, 5)]


@settings(derandomize=True, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=60))
def test_no_announced_work_is_lost_or_run_twice(events: list[tuple[int, bool]]) -> None:
    sequencer = StepSequencer(range(4))
    waiting: set[int] = set()
    for rank, has_work in events:
        if rank in waiting:
            continue  # a worker says nothing more until its step has run
        sequencer.offer(rank, Announcement.WORK if has_work else Announcement.IDLE, [1])
        if has_work:
            waiting.add(rank)
        layout = sequencer.next_step()
        if layout is not None:
            assert set(layout.lane_tokens) == waiting
            waiting.clear()
    for rank in sequencer.awaited:
        sequencer.offer(rank, Announcement.IDLE)
    layout = sequencer.next_step()
    assert set(layout.lane_tokens if layout else ()) == waiting
