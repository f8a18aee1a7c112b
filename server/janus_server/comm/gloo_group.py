"""An epoch's group of processes over gloo: meeting it, what is used of it, and closing it.

The time of a gloo deadline starts with the wait, not with the post. When a deadline passes, the
whole group of this process is closed, for every thread: so wait only where a peer is overdue by
then.
"""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from janus_server.addresses import first_address, split_address
from janus_server.comm.base import PendingTransfer
from janus_server.comm.epoch import GroupConfig
from janus_server.comm.listening_sockets import admit_no_more, listening_sockets
from janus_server.errors import PeerLostError

_CPP_PLACE = re.compile(r"^\[[^\]]*\.cc:\d+\] ")
_CLOSED_HERE = "Application timeout caused pair closure"
_UNUSED_TAG = 2**30
"""Nothing is ever sent under it."""
_making_device = threading.Lock()
"""So that a device is known to have opened the sockets that began to listen meanwhile."""


class GroupClosedError(PeerLostError):
    """Another thread of this process closed the group, and knows the reason."""


class Group(Protocol):
    """The part of ProcessGroupGloo that is used here; torch has no type stubs for it."""

    def send(self, tensors: list[torch.Tensor], rank: int, tag: int) -> PendingTransfer:
        """Send one contiguous CPU tensor, which must live until the transfer is done."""
        ...

    def recv(self, tensors: list[torch.Tensor], rank: int, tag: int) -> PendingTransfer:
        """Receive into one contiguous CPU tensor."""
        ...


def join_group(config: GroupConfig) -> Group:
    """Meet the other workers of the epoch; raises PeerLostError if they do not come in time."""
    gloo: Any = dist.ProcessGroupGloo
    host, port = split_address(config.store_address)
    options = gloo._Options()
    options._timeout = timedelta(seconds=config.timeout_s)
    with _making_device:
        others = listening_sockets()
        options._devices = [gloo.create_device(hostname=first_address(config.own_host))]
        listeners = [fd for name, fd in listening_sockets().items() if name not in others]
    size = config.num_attention + config.num_experts
    join_timeout = timedelta(seconds=config.join_timeout_s)
    with peer_errors(f"while the group {config.prefix} was forming"):
        store = dist.PrefixStore(
            config.prefix, dist.TCPStore(host.strip("[]"), port, timeout=join_timeout)
        )
        # Waited for here, since gloo's only timeout is that of a step: too short for peers that
        # still load weights.
        store.set(f"arrived-{config.rank}", "")
        store.wait([f"arrived-{rank}" for rank in range(size)], join_timeout)
        group: Group = gloo(store, config.rank, size, options)
    for descriptor in listeners:
        admit_no_more(descriptor)
    return group


def close_group(group: Group, peer: int) -> None:
    """Close the connections to all peers; `peer` is the rank of any of them.

    All threads that wait for the group, here and on the other side, raise at once.
    """
    # Gloo's `abort` and `shutdown` leave waiting threads waiting; a deadline that passes does not.
    with suppress(RuntimeError):
        arrival = group.recv([torch.zeros(1)], peer, _UNUSED_TAG)
        arrival.wait(timedelta(milliseconds=1))


@contextmanager
def peer_errors(when: str) -> Iterator[None]:
    """Turn gloo's errors into PeerLostError that says `when`."""
    try:
        yield
    except RuntimeError as error:
        # Only the reason: the C++ file before it, gloo's advice and the C++ trace are left out.
        reason = _CPP_PLACE.sub("", str(error).partition("\n")[0]).partition(". This is")[0]
        kind = GroupClosedError if reason.startswith(_CLOSED_HERE) else PeerLostError
        raise kind(f"a peer of the group was lost {when}: {reason}") from error
