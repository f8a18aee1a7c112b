"""The gloo transport: processes of one or several hosts, over TCP, through torch.distributed.

An epoch's group is a process-group object of its own, built from the epoch's key prefix in the
store. There is no global group: so the next epoch needs no restart, and late data of this epoch
cannot reach it. Ranks: attention workers first, then expert workers. Tag 0 carries announcements
and the starts of steps; each (layer, lane) has a tag above it for hidden states and partial
results. Receives are posted before the data can come: gloo then saves a round trip.

Invariant: the deadline bounds the silence of a peer, never the length of a step. Within a step it
bounds each wait for data. An attention worker that has announced a step need not announce anything
before that step is over. Until the step starts, which a step of others may delay, the first expert
worker sends it signs of life. Idle attention workers send signs of life all the time.
"""

import queue
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

import torch

from janus_server.comm.base import (
    DispatchHandle,
    PartialFfn,
    PendingTransfer,
    sum_partials,
)
from janus_server.comm.config import MAX_LANES
from janus_server.comm.epoch import GroupConfig
from janus_server.comm.gloo_group import Group, GroupClosedError, close_group, peer_errors
from janus_server.comm.sequencing import Announcement, StepLayout, StepSequencer
from janus_server.comm.step_words import (
    ANNOUNCEMENT_WORDS,
    layout_words_of,
    read_announcement,
    read_layout,
    write_announcement,
    write_layout,
)
from janus_server.errors import PeerLostError

_CONTROL_TAG = 0
_LISTENER_GRACE_S = 1.0
"""How long listeners may take to notice the end, in seconds."""
_SIGN_OF_LIFE = torch.tensor([int(Announcement.IDLE)])
_STEP_STARTS = torch.tensor([int(Announcement.WORK)])

_Heard = tuple[int, Announcement, tuple[int, ...]]
"""(rank, what it announced, tokens in each lane)"""


class GlooExpertPool:
    """Attention side: the expert workers of the epoch."""

    def __init__(self, group: Group, config: GroupConfig) -> None:
        self._group = group
        self._experts = config.expert_ranks
        self._announcement: PendingTransfer | None = None
        # Kept while gloo reads from it.
        self._words = torch.zeros(ANNOUNCEMENT_WORDS, dtype=torch.int64)
        self._start: PendingTransfer | None = None
        self._start_word = torch.zeros_like(_STEP_STARTS)

    def begin_step(self, lane_tokens: Sequence[int]) -> None:
        """Announce a step; the message travels while the first layer's attention is computed."""
        self._announce(Announcement.WORK, lane_tokens)
        self._start = self._post_start()

    def dispatch(self, layer: int, lane: int, hidden_TH: torch.Tensor) -> DispatchHandle:
        """Send to every expert worker, and post the receives of their answers."""
        tag = _data_tag(layer, lane)
        sent_TH = hidden_TH.to("cpu").contiguous()
        partials_WTH = sent_TH.new_empty(len(self._experts), *sent_TH.shape)
        with peer_errors("while dispatching"):
            pending = [self._group.send([sent_TH], rank, tag) for rank in self._experts]
            # Posted now, while the experts compute, rather than in `combine`.
            pending += [
                self._group.recv([partial_TH], rank, tag)
                for partial_TH, rank in zip(partials_WTH, self._experts, strict=True)
            ]
        return DispatchHandle(
            layer=layer, lane=lane, sent_TH=sent_TH, partials_WTH=partials_WTH, pending=pending
        )

    def combine(self, handle: DispatchHandle) -> torch.Tensor:
        """Wait for all partial results and add them up, fp32 [T, H], on the CPU."""
        self._await_start()
        with peer_errors(f"while waiting for the experts of layer {handle.layer}"):
            for transfer in handle.pending:
                transfer.wait()
        return sum_partials(handle.partials_WTH)

    def idle(self) -> None:
        """Announce that there is no work for now."""
        self._announce(Announcement.IDLE)

    def close(self) -> None:
        """Announce the end, and wait until the first expert worker has heard it."""
        self._announce(Announcement.CLOSE)
        self._await_announcement()

    def abandon(self) -> None:
        """Let go of all peers at once, from any thread: waiting threads raise PeerLostError."""
        close_group(self._group, peer=self._experts[0])

    def _post_start(self) -> PendingTransfer:
        with peer_errors("while announcing a step"):
            return self._group.recv([self._start_word], self._experts[0], _CONTROL_TAG)

    def _await_start(self) -> None:
        """Wait for the announced step to start, as long as signs of life come meanwhile."""
        while self._start is not None:
            with peer_errors("while waiting for a step to start"):
                self._start.wait()
            has_started = torch.equal(self._start_word, _STEP_STARTS)
            if not has_started and not torch.equal(self._start_word, _SIGN_OF_LIFE):
                raise PeerLostError(
                    "the first expert worker was given up: it answered a step with "
                    f"{self._start_word.item()}"
                )
            self._start = None if has_started else self._post_start()

    def _announce(self, kind: Announcement, lane_tokens: Sequence[int] = ()) -> None:
        self._await_start()  # a step without MoE layers has not waited for its start yet
        self._await_announcement()
        self._words[:] = torch.tensor(write_announcement(kind, lane_tokens))
        with peer_errors("while announcing a step"):
            self._announcement = self._group.send([self._words], self._experts[0], _CONTROL_TAG)

    def _await_announcement(self) -> None:
        if self._announcement is not None:
            with peer_errors("while announcing a step"):
                self._announcement.wait()
            self._announcement = None


class GlooAttentionPool:
    """Expert side: the attention workers of the epoch, and the order of steps.

    The first expert worker collects announcements, passes the layout of each step on to the other
    expert workers, and tells the participants that the step starts.
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
        self._heard: queue.SimpleQueue[_Heard | PeerLostError] = queue.SimpleQueue()
        self._waiting: set[int] = set()
        """Attention workers whose announced step has not started; read by listeners, too."""
        self._waiting_lock = threading.Lock()
        listened = range(config.num_attention if self._leads else 0)
        self._step_over = {rank: threading.Event() for rank in listened}
        """For each attention worker: set when the step that it announced last is over."""
        self._listeners = [
            threading.Thread(target=self._listen, args=(rank,), name=f"listen-{rank}", daemon=True)
            for rank in listened
        ]
        for listener in self._listeners:
            listener.start()

    def serve(self, ffn: PartialFfn, layers: Sequence[int]) -> None:
        """Run steps over the MoE `layers` until every attention worker has closed.

        Raises PeerLostError if an attention worker dies or stays silent past the deadline.
        """
        try:
            while (layout := self._next_step()) is not None:
                self._run_step(layout, ffn, layers)
                for rank in layout.lane_tokens if self._leads else ():
                    self._step_over[rank].set()
        except GroupClosedError as error:
            raise self._why_closed(error) from error
        finally:
            # The group is not needed any more, and a thread that is still inside gloo when the
            # process exits would abort it.
            self.abandon()
            for listener in self._listeners:
                listener.join(_LISTENER_GRACE_S)

    def abandon(self) -> None:
        """Let go of all peers at once, from any thread: `serve` raises PeerLostError."""
        close_group(self._group, peer=0)
        self._heard.put(PeerLostError("the attention workers were given up"))
        for event in self._step_over.values():
            event.set()

    def _why_closed(self, error: PeerLostError) -> PeerLostError:
        with suppress(queue.Empty):
            while True:
                heard = self._heard.get(timeout=_LISTENER_GRACE_S)
                if isinstance(heard, PeerLostError):
                    return heard
        return error

    def _run_step(self, layout: StepLayout, ffn: PartialFfn, layers: Sequence[int]) -> None:
        units = [
            (layer, lane)
            for layer in layers
            for lane in range(layout.num_lanes)
            if layout.tokens_of(lane)
        ]
        starts = self._tell_participants(layout)
        # One receive ahead in each lane: an attention worker sends no more before it is answered.
        posted = deque(self._post(layout, *unit) for unit in units[: layout.num_lanes])
        # Answers under way; their tensors are kept while gloo reads from them.
        sent: deque[tuple[PendingTransfer, torch.Tensor]] = deque()
        for index, (layer, lane) in enumerate(units):
            hidden_TH, arrivals = posted.popleft()
            with peer_errors(f"while waiting for the tokens of layer {layer}"):
                for arrival in arrivals:
                    arrival.wait()
            partial_TH = ffn(layer, hidden_TH.to(self._device)).to("cpu")
            participants = layout.tokens_of(lane)
            parts = torch.split(partial_TH, [tokens for _, tokens in participants])
            with peer_errors(f"while answering layer {layer}"):
                for (rank, _), part_TH in zip(participants, parts, strict=True):
                    transfer = self._group.send([part_TH], rank, _data_tag(layer, lane))
                    sent.append((transfer, part_TH))
            # After the answer, because the attention worker waits for that before it sends more.
            if index + layout.num_lanes < len(units):
                posted.append(self._post(layout, *units[index + layout.num_lanes]))
            with peer_errors(f"while answering layer {layer}"):
                while len(sent) > layout.num_lanes * len(layout.lane_tokens):
                    sent.popleft()[0].wait()
        with peer_errors("while answering the last layer"):
            for transfer in (*starts, *(transfer for transfer, _ in sent)):
                transfer.wait()

    def _tell_participants(self, layout: StepLayout) -> list[PendingTransfer]:
        if not self._leads:
            return []
        with self._waiting_lock:  # so that no sign of life can follow the start
            self._waiting -= set(layout.lane_tokens)
        with peer_errors("while starting a step"):
            return [
                self._group.send([_STEP_STARTS], rank, _CONTROL_TAG) for rank in layout.lane_tokens
            ]

    def _post(
        self, layout: StepLayout, layer: int, lane: int
    ) -> tuple[torch.Tensor, list[PendingTransfer]]:
        participants = layout.tokens_of(lane)
        counts = [tokens for _, tokens in participants]
        hidden_TH = torch.empty(sum(counts), self._hidden_size, dtype=self._dtype)
        with peer_errors(f"before layer {layer}"):
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
            # No deadline here: whenever no step can start, a listener waits for a peer with a
            # deadline, and puts into the queue that it passed.
            heard = self._heard.get()
            if isinstance(heard, PeerLostError):
                raise heard
            rank, kind, lane_tokens = heard
            self._sequencer.offer(rank, kind, lane_tokens)
            if kind is Announcement.IDLE:
                self._lead(Announcement.IDLE)
        self._lead(Announcement.WORK, layout)
        return layout

    def _listen(self, rank: int) -> None:
        words = torch.zeros(ANNOUNCEMENT_WORDS, dtype=torch.int64)
        max_tokens = self._config.max_batch_tokens[rank]
        kind = Announcement.IDLE
        try:
            while kind is not Announcement.CLOSE:
                with peer_errors(f"while listening to attention worker {rank}"):
                    arrival = self._group.recv([words], rank, _CONTROL_TAG)
                    if kind is Announcement.WORK:
                        self._await_step_end(rank)
                    arrival.wait()
                kind, lane_tokens = read_announcement(
                    words.tolist(), rank=rank, max_tokens=max_tokens
                )
                if kind is Announcement.WORK:
                    self._step_over[rank].clear()
                    with self._waiting_lock:
                        self._waiting.add(rank)
                self._heard.put((rank, kind, lane_tokens))
        except GroupClosedError:
            return  # the thread that closed the group has said why
        except PeerLostError as error:
            self._heard.put(error)

    def _await_step_end(self, rank: int) -> None:
        """Wait until the step that it announced is over; send signs of life until it starts."""
        signs: list[PendingTransfer] = []  # kept: a transfer that is dropped is not sent
        while not self._step_over[rank].wait(self._config.sign_of_life_s):
            with self._waiting_lock:
                if rank in self._waiting:
                    signs.append(self._group.send([_SIGN_OF_LIFE], rank, _CONTROL_TAG))

    def _lead(self, kind: Announcement, layout: StepLayout | None = None) -> None:
        """Tell the other expert workers what comes next."""
        words = torch.tensor(write_layout(kind, layout, num_attention=self._config.num_attention))
        with peer_errors("while passing a step on to the expert workers"):
            for transfer in [
                self._group.send([words], rank, _CONTROL_TAG)
                for rank in self._config.expert_ranks[1:]
            ]:
                transfer.wait()

    def _follow(self) -> StepLayout | None:
        words = torch.zeros(layout_words_of(self._config.num_attention), dtype=torch.int64)
        kind, layout = Announcement.IDLE, None
        # Twice the deadline: the first expert worker may finish its layer and then wait for a
        # silent peer. It must give up before this worker, as it knows which peer was silent.
        deadline = timedelta(seconds=2 * self._config.timeout_s)
        while kind is Announcement.IDLE:
            with peer_errors("while waiting for the first expert worker to start a step"):
                self._group.recv([words], self._config.expert_ranks[0], _CONTROL_TAG).wait(deadline)
            kind, layout = read_layout(words.tolist(), max_tokens=self._config.max_batch_tokens)
        return layout


def _data_tag(layer: int, lane: int) -> int:
    return 1 + layer * MAX_LANES + lane
