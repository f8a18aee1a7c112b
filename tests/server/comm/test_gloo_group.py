import os
import socket

import pytest

from janus_server.comm.gloo_group import close_group, join_group
from janus_server.comm.listening_sockets import listening_sockets
from tests.fakes.gloo_group import group_configs, in_thread

DEADLINE_S = 60


def test_a_group_that_has_met_accepts_no_further_connection() -> None:
    others = listening_sockets()
    with group_configs(1, 2) as configs:
        joining = [in_thread(lambda c=config: join_group(c)) for config in configs]
        groups = [future.result(DEADLINE_S) for future in joining]
    # The store, which listens too, is gone.
    listeners = listening_sockets() - others
    assert len(listeners) == len(groups)
    for descriptor, _ in listeners:
        with socket.socket(fileno=os.dup(descriptor)) as listener, socket.socket() as client:
            client.settimeout(0.2)
            with pytest.raises(TimeoutError):
                client.connect(listener.getsockname())
    for group in groups:
        close_group(group, 1)
