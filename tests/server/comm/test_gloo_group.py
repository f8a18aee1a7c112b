import socket

import pytest

from janus_server.comm.gloo_group import close_group, join_group
from janus_server.comm.listening_sockets import listening_sockets
from janus_server.own_sockets import duplicate
from tests.fakes.gloo_group import group_configs, in_thread

DEADLINE_S = 60


def test_a_group_that_has_met_accepts_no_further_connection() -> None:
    others = listening_sockets()
    with group_configs(1, 2) as configs:
        joining = [in_thread(lambda c=config: join_group(c)) for config in configs]
        groups = [future.result(DEADLINE_S) for future in joining]
    # The store, which listens too, is gone.
    listeners = [fd for name, fd in listening_sockets().items() if name not in others]
    assert len(listeners) == len(groups)
    for descriptor in listeners:
        with duplicate(descriptor) as listener, socket.socket() as client:
            client.settimeout(0.2)
            with pytest.raises(TimeoutError):
                client.connect(listener.getsockname())
    for group in groups:
        close_group(group, 1)
