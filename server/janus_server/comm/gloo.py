"""The gloo transport: processes of one or several hosts, over TCP, through torch.distributed.

An epoch's group is a process-group object of its own, built from the epoch's key prefix in the
store; no global group exists, so that the next epoch needs no restart and late data of this one can
reach nobody. Ranks: attention workers first, then expert workers. Tag 0 carries announcements; the
tags above it the hidden states and partial results of (layer, lane). Receives are posted before the
data can come: gloo then saves a round trip.
"""

import queue
import re
import socket
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from janus_server.comm.base import (
    DispatchHandle,
    PartialFfn,
    PendingTransfer,
    sum_partials,
)
from janus_server.comm.config import MAX_LANES
from janus_server.comm.epoch import GroupConfig
from janus_server.comm.sequencing import Announcement, StepLayout, StepSequencer
from janus_server.errors import PeerLostError

_CONTROL_TAG = 0
_CPP_PLACE = re.compile(r"^\[[^\]]*\.cc:\d+\] ")
_LISTENER_GRACE_S = 1.0
"""How long listeners may take to notice the end, in seconds."""
_ANNOUNCEMENT_WORDS = 2 + MAX_LANES


class Group(Protocol):
    """The part of ProcessGroupGloo that is used; torch's type stubs leave it out."""

    def send(self, tensors: list[torch.Tensor], rank: int, tag: int) -> PendingTransfer:
        """Send one contiguous CPU tensor, which must live until the transfer is done."""
        ...

    def recv(self, tensors: list[torch.Tensor], rank: int, tag: int) -> PendingTransfer:
        """Receive into one contiguous CPU tensor."""
        ...


def join_group(config: GroupConfig) -> Group:
    """Meet the other workers of the epoch; raises PeerLostError if they do not come in time."""
    gloo: Any = dist.ProcessGroupGloo
    host, _, port = config.store_address.rpartition(":")
    options = gloo._Options()
    options._timeout = timedelta(seconds=config.timeout_s)
    options._devices = [gloo.create_device(hostname=_own_address(host, int(port)))]
    size = config.num_attention + config.num_experts
    join_timeout = timedelta(seconds=config.join_timeout_s)
    with _peer_errors(f"while the group {config.prefix} was forming"):
        store = dist.PrefixStore(
            config.prefix, dist.TCPStore(host, int(port), timeout=join_timeout)
        )
        # Gloo has one timeout for all: it would bound the loading of weights as well.
        store.set(f"arrived-{config.rank}", "")
        store.wait([f"arrived-{rank}" for rank in range(size)], join_timeout)
        group: Group = gloo(store, config.rank, size, options)
    return group


class GlooExpertPool:
    """Attention side: the expert workers of the epoch."""

    def __init__(self, group: Group, config: GroupConfig) -> None:
        self._group = group
        self._experts = config.expert_ranks
        self._announcement: PendingTransfer | None = None
        # Kept while gloo reads from it.
        self._words = torch.zeros(_ANNOUNCEMENT_WORDS, dtype=torch.int64)

    def begin_step(self, lane_tokens: Sequence[int]) -> None:
        """Announce a step; travels while the first layer's attention is computed."""
        self._announce(Announcement.WORK, lane_tokens)

    def dispatch(self, layer: int, lane: int, hidden_TH: torch.Tensor) -> DispatchHandle:
        """Send to every expert worker and post the receives of their answers."""
        tag = _data_tag(layer, lane)
        sent_TH = hidden_TH.to("cpu").contiguous()
        partials_WTH = sent_TH.new_empty(len(self._experts), *sent_TH.shape)
        with _peer_errors("while dispatching"):
            pending = [self._group.send([sent_TH], rank, tag) for rank in self._experts]
            # Posted while the experts compute.
            pending += [
                self._group.recv([partial_TH], rank, tag)
                for partial_TH, rank in zip(partials_WTH, self._experts, strict=True)
            ]
        return DispatchHandle(
            layer=layer, lane=lane, sent_TH=sent_TH, partials_WTH=partials_WTH, pending=pending
        )

    def combine(self, handle: DispatchHandle) -> torch.Tensor:
        """Wait for all partial results and add them up, fp32 [T, H], on the CPU."""
        with _peer_errors(f"while waiting for the experts of layer {handle.layer}"):
            for transfer in handle.pending:
                transfer.wait()
        return sum_partials(handle.partials_WTH)

    def idle(self) -> None:
        """Announce that there is no work for now."""
        self._announce(Announcement.IDLE)

    def close(self) -> None:
        """Announce the end and wait until it is heard."""
        self._announce(Announcement.CLOSE)
        self._await_announcement()

    def _announce(self, kind: Announcement, lane_tokens: Sequence[int] = ()) -> None:
        self._await_announcement()
        self._words[0], self._words[1] = kind, len(lane_tokens)
        for lane, tokens in enumerate(lane_tokens):
            self._words[2 + lane] = tokens
        with _peer_errors("while announcing a step"):
            self._announcement = self._group.send([self._words], self._experts[0], _CONTROL_TAG)

    def _await_announcement(self) -> None:
        if self._announcement is not None:
            with _peer_errors("while announcing a step"):
                self._announcement.wait()
            self._announcement = None


class GlooAttentionPool:
    """Expert side: the attention workers of the epoch, and the order of steps.

    The first expert worker collects announcements and passes the layout of each step on to the
    other expert workers.
    """

    def __init__(
        self,
        group: Group,
        config: GroupConfig,
        *,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._group = group
        self._config = config
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._device = device
        self._leads = config.rank == config.expert_ranks[0]
        self._sequencer = StepSequencer(range(config.num_attention))
        self._heard: queue.Queue[tuple[int, list[int] | PeerLostError]] = queue.Queue()
        self._listeners = [
            threading.Thread(target=self._listen, args=(rank,), name=f"listen-{rank}", daemon=True)
            for rank in range(config.num_attention if self._leads else 0)
        ]
        for listener in self._listeners:
            listener.start()

    def serve(self, ffn: PartialFfn, layers: Sequence[int]) -> None:
        """Run steps over the MoE `layers` until every attention worker has closed.

        Raises PeerLostError where one dies or stays silent past the deadline.
        """
        try:
            while (layout := self._next_step()) is not None:
                self._run_step(layout, ffn, layers)
        finally:
            # A thread that is still inside gloo would abort the interpreter's exit.
            for listener in self._listeners:
                listener.join(_LISTENER_GRACE_S)

    def _run_step(self, layout: StepLayout, ffn: PartialFfn, layers: Sequence[int]) -> None:
        units = [
            (layer, lane)
            for layer in layers
            for lane in range(layout.num_lanes)
            if layout.tokens_of(lane)
        ]
        # One receive ahead in each lane: an attention worker has at most that many on their way.
        posted = deque(self._post(layout, *unit) for unit in units[: layout.num_lanes])
        # Answers on their way; their tensors are kept while gloo reads from them.
        sent: deque[tuple[PendingTransfer, torch.Tensor]] = deque()
        for index, (layer, lane) in enumerate(units):
            hidden_TH, arrivals = posted.popleft()
            with _peer_errors(f"while waiting for the tokens of layer {layer}"):
                for arrival in arrivals:
                    arrival.wait()
            partial_TH = ffn(layer, hidden_TH.to(self._device)).to("cpu")
            participants = layout.tokens_of(lane)
            parts = torch.split(partial_TH, [tokens for _, tokens in participants])
            with _peer_errors(f"while answering layer {layer}"):
                for (rank, _), part_TH in zip(participants, parts, strict=True):
                    transfer = self._group.send([part_TH], rank, _data_tag(layer, lane))
                    sent.append((transfer, part_TH))
            # After the answer, for which the attention worker waits before it sends more.
            if index + layout.num_lanes < len(units):
                posted.append(self._post(layout, *units[index + layout.num_lanes]))
            with _peer_errors(f"while answering layer {layer}"):
                while len(sent) > layout.num_lanes * len(layout.lane_tokens):
                    sent.popleft()[0].wait()
        with _peer_errors("while answering the last layer"):
            for transfer, _ in sent:
                transfer.wait()

    def _post(
        self, layout: StepLayout, layer: int, lane: int
    ) -> tuple[torch.Tensor, list[PendingTransfer]]:
        participants = layout.tokens_of(lane)
        counts = [tokens for _, tokens in participants]
        hidden_TH = torch.empty(sum(counts), self._hidden_size, dtype=self._dtype)
        with _peer_errors(f"before layer {layer}"):
            return hidden_TH, [
                self._group.recv([rows_TH], rank, _data_tag(layer, lane))
                for (rank, _), rows_TH in zip(
                    participants, torch.split(hidden_TH, counts), strict=True
                )
            ]

    def _next_step(self) -> StepLayout | None:
        if not self._leads:
            return self._follow()
        while (layout := self._sequencer.next_step()) is None:
            if self._sequencer.closed:
                self._lead(Announcement.CLOSE)
                return None
            rank, words = self._next_announcement()
            kind = Announcement(words[0])
            self._sequencer.offer(rank, kind, words[2 : 2 + words[1]])
            if kind is Announcement.IDLE:
                self._lead(Announcement.IDLE)
        self._lead(Announcement.WORK, layout)
        return layout

    def _next_announcement(self) -> tuple[int, list[int]]:
        try:
            rank, heard = self._heard.get(timeout=self._config.timeout_s)
        except queue.Empty:
            silent = sorted(self._sequencer.awaited) or "all"
            raise PeerLostError(
                f"no word from the attention workers (ranks: {silent}) for "
                f"{self._config.timeout_s:g} s"
            ) from None
        if isinstance(heard, PeerLostError):
            raise heard
        return rank, heard

    def _listen(self, rank: int) -> None:
        words = torch.zeros(_ANNOUNCEMENT_WORDS, dtype=torch.int64)
        try:
            while True:
                with _peer_errors(f"while listening to attention worker {rank}"):
                    self._group.recv([words], rank, _CONTROL_TAG).wait()
                self._heard.put((rank, words.tolist()))
                if words[0] == Announcement.CLOSE:
                    return
        except PeerLostError as error:
            self._heard.put((rank, error))

    def _lead(self, kind: Announcement, layout: StepLayout | None = None) -> None:
        """Pass on what happens next: [kind, then lanes and tokens of each attention worker]."""
        words = torch.zeros(1 + self._config.num_attention * (1 + MAX_LANES), dtype=torch.int64)
        words[0] = kind
        table = words[1:].view(self._config.num_attention, 1 + MAX_LANES)
        for rank, tokens in layout.lane_tokens.items() if layout else ():
            table[rank, : 1 + len(tokens)] = torch.tensor([len(tokens), *tokens])
        with _peer_errors("while passing a step on to the expert workers"):
            for transfer in [
                self._group.send([words], rank, _CONTROL_TAG)
                for rank in self._config.expert_ranks[1:]
            ]:
                transfer.wait()

    def _follow(self) -> StepLayout | None:
        words = torch.zeros(1 + self._config.num_attention * (1 + MAX_LANES), dtype=torch.int64)
        kind = Announcement.IDLE
        while kind is Announcement.IDLE:
            with _peer_errors("while waiting for the first expert worker to start a step"):
                self._group.recv([words], self._config.expert_ranks[0], _CONTROL_TAG).wait()
            kind = Announcement(int(words[0]))
        if kind is Announcement.CLOSE:
            return None
        table = words[1:].view(self._config.num_attention, 1 + MAX_LANES).tolist()
        return StepLayout(
            lane_tokens={
                rank: tuple(row[1 : 1 + row[0]]) for rank, row in enumerate(table) if row[0]
            }
        )


def _data_tag(layer: int, lane: int) -> int:
    return 1 + layer * MAX_LANES + lane


def _own_address(host: str, port: int) -> str:
    """The address of this machine that reaches the store, so that peers can reach it in turn."""
    with socket.create_connection((host, port), timeout=10) as probe:
        address: str = probe.getsockname()[0]
        return address


@contextmanager
def _peer_errors(when: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # Without the C++ file in front and the C++ trace behind.
        reason = _CPP_PLACE.sub("", str(error).partition("\n")[0])
        raise PeerLostError(f"a peer of the group was lost {when}: {reason}") from error
