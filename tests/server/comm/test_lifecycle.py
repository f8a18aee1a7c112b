import asyncio
from typing import Any, cast

import pytest

from janus_server.comm.control_client import ControlClient
from janus_server.comm.lifecycle import run_until_stopped
from janus_server.errors import PeerLostError


class FakeControl:
    """A control client that notes whether its worker left."""

    def __init__(self) -> None:
        self.lost = asyncio.Event()
        self.loss = "expert-1 left the epoch"
        self.has_left = False

    async def leave(self) -> None:
        self.has_left = True


def run(control: FakeControl, work: Any, stop: asyncio.Event, *, has_parent: bool = False) -> None:
    asyncio.run(
        run_until_stopped(
            work, stop=stop, control=cast(ControlClient, control), has_parent=has_parent
        )
    )


@pytest.mark.parametrize("has_parent", [False, True])
def test_a_worker_without_a_parent_tells_that_it_leaves(has_parent: bool) -> None:
    control, stop = FakeControl(), asyncio.Event()
    stop.set()
    run(control, asyncio.sleep(600), stop, has_parent=has_parent)
    assert control.has_left is not has_parent


def test_work_that_is_done_leaves_nobody() -> None:
    control = FakeControl()
    run(control, asyncio.sleep(0), asyncio.Event())
    assert not control.has_left


def test_the_end_of_the_epoch_ends_the_work_by_name() -> None:
    control = FakeControl()
    control.lost.set()
    with pytest.raises(PeerLostError, match="expert-1 left the epoch"):
        run(control, asyncio.sleep(600), asyncio.Event())
    assert not control.has_left
