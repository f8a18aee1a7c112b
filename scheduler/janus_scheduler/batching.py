"""Continuous batching: which sequences feed which tokens in the next step, over which KV blocks.

`plan` decides and `complete` records the result of the step; neither touches a tensor. A step feeds
every decoding sequence its one token first, then prefill chunks in order of arrival, then the first
chunks of newly admitted sequences, all within `max_batch_tokens`.

Invariants, and why every request ends:

* Running sequences all arrived before the waiting ones, and both are in order of arrival: admission
  takes the first that waits, and preemption puts the latest that runs back in front of the queue.
* Every running sequence feeds at least one token in every step. A sequence is admitted only where
  budget is left after all that run, so more never run than there are tokens in the budget.
* The blocks of all tokens that a sequence has, and of the token it samples next, are taken at
  admission (adjacent, where possible). So a prefill never lacks a block; only decoding ones do.
* A decoding sequence that finds no block preempts the latest arrival, which may be itself. The
  oldest is the latest only when it runs alone, and then it fits: `add` asserts that. So the oldest
  feeds at least one token in every step, and ends.
* An admission leaves one free block for every running sequence that may still grow. In
  `block_size` steps a sequence grows by at most one block, so none is preempted in the
  `block_size` steps that follow an admission: a sequence that is preempted and comes back gets at
  least that many steps. Alone, a sequence that fits the pool always meets this rule.

A plan may be dropped instead of completed, as when a peer is lost in the middle of its step: the
next `plan` feeds the same tokens again, over the same blocks.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

from janus_scheduler.kv_blocks import BlockAllocator
from janus_scheduler.request import FinishReason, Sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class SequencePlan:
    """What one sequence does in a step."""

    request_id: str
    start: int
    """Position of the first token that is fed."""
    num_tokens: int
    token_ids: tuple[int, ...]
    """The tokens at positions `start` to `start + num_tokens`."""
    block_table: tuple[int, ...]
    """KV blocks of the sequence from position 0 on; covers at least the tokens that are fed."""
    samples: bool
    """Whether the last known token is fed, so that the token at `start + num_tokens` is sampled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """One step: never empty, no sequence twice."""

    number: int
    """Counts the plans of a batcher from 1."""
    lanes: tuple[tuple[SequencePlan, ...], ...]
    """Micro-batches, each with at least one sequence."""
    preempted: tuple[str, ...]
    """Requests that lost their KV blocks to this step; they wait, and will be computed again."""

    @property
    def sequences(self) -> tuple[SequencePlan, ...]:
        """All sequences, lane by lane: the order in which logits come."""
        return tuple(sequence for lane in self.lanes for sequence in lane)

    @property
    def lane_tokens(self) -> tuple[int, ...]:
        """Tokens fed by each lane."""
        return tuple(sum(sequence.num_tokens for sequence in lane) for lane in self.lanes)

    @property
    def num_tokens(self) -> int:
        """Tokens fed by the step."""
        return sum(self.lane_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledToken:
    """A new token of a request."""

    request_id: str
    token_id: int
    finish_reason: FinishReason | None
    """Set when the request is over and its KV blocks are free again."""


@dataclass(kw_only=True, slots=True)
class _Entry:
    """A sequence in the batcher."""

    sequence: Sequence
    max_fed: int
    """Tokens of the whole sequence that are ever fed: all but the last, which is only sampled."""
    block_table: list[int] = field(default_factory=list)

    @property
    def num_unfed(self) -> int:
        """Known tokens whose keys and values are not in the KV cache yet; 1: it decodes."""
        return self.sequence.num_tokens - self.sequence.num_computed


class Batcher:
    """Owns the sequences and KV blocks of one attention worker."""

    def __init__(
        self,
        *,
        max_batch_tokens: int,
        max_sequences: int,
        block_size: int,
        num_blocks: int,
        max_lanes: int = 1,
    ) -> None:
        """All are at least 1; `max_sequences` bounds the sequences that run at the same time."""
        assert min(max_batch_tokens, max_sequences, block_size, num_blocks, max_lanes) >= 1
        self.block_size = block_size
        self.num_preemptions = 0
        """Preemptions since the start."""
        self._max_batch_tokens = max_batch_tokens
        self._max_sequences = max_sequences
        self._max_lanes = max_lanes
        self._allocator = BlockAllocator(num_blocks)
        # Both by request id, in order of arrival.
        self._running: dict[str, _Entry] = {}
        self._waiting: OrderedDict[str, _Entry] = OrderedDict()
        self._num_plans = 0
        # Number of the plan that `complete` may record, 0: none. An abort drops its sequence.
        self._open_plan = 0
        self._planned: dict[str, _Entry] = {}

    @property
    def num_running(self) -> int:
        """Sequences that hold KV blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that are queued, preempted ones included."""
        return len(self._waiting)

    @property
    def num_free_blocks(self) -> int:
        """KV blocks that no sequence holds."""
        return self._allocator.num_free

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; the caller has refused sequences that the pool can never hold."""
        request_id, max_tokens = sequence.request_id, sequence.params.max_tokens
        assert request_id not in self._running, f"request {request_id} is running already"
        assert request_id not in self._waiting, f"request {request_id} is waiting already"
        assert sequence.prompt_ids, f"request {request_id} has no prompt"
        assert len(sequence.output_ids) < max_tokens, f"request {request_id} has all its tokens"
        assert sequence.num_computed == 0, f"request {request_id} was computed elsewhere"
        entry = _Entry(sequence=sequence, max_fed=len(sequence.prompt_ids) + max_tokens - 1)
        assert self._num_blocks(entry.max_fed) <= self._allocator.num_blocks, (
            f"request {request_id} of up to {entry.max_fed} tokens fits no pool of "
            f"{self._allocator.num_blocks} blocks"
        )
        self._waiting[request_id] = entry

    def abort(self, request_id: str) -> bool:
        """Drop a sequence and free its KV blocks at once; false if it is not here (any more).

        If the sequence is in a plan that is not completed yet, its part of the plan is ignored.
        """
        entry = self._running.get(request_id) or self._waiting.get(request_id)
        if entry is None:
            return False
        self._remove(entry)
        return True

    def plan(self) -> StepPlan | None:
        """The next step; None if there is no sequence at all."""
        planned, preempted = self._plan_decodes()
        planned += self._plan_prefills(self._max_batch_tokens - len(planned))
        if not preempted:
            num_fed = sum(sequence.num_tokens for sequence in planned)
            planned += self._admit(self._max_batch_tokens - num_fed)
        self._planned = {
            sequence.request_id: self._running[sequence.request_id] for sequence in planned
        }
        if not planned:
            self._open_plan = 0
            return None
        self._num_plans += 1
        self._open_plan = self._num_plans
        return StepPlan(
            number=self._num_plans,
            lanes=_split_lanes(planned, self._max_lanes),
            preempted=tuple(preempted),
        )

    def complete(self, plan: StepPlan, sampled: Mapping[str, int]) -> list[SampledToken]:
        """Record a step that was run: `sampled` holds a token id for every sequence that samples.

        Only the latest plan can be completed, once. Returns the new tokens in the plan's order.
        """
        assert plan.number == self._open_plan, f"plan {plan.number} is over or was replaced"
        self._open_plan = 0
        results: list[SampledToken] = []
        for planned in plan.sequences:
            entry = self._planned.pop(planned.request_id, None)
            if entry is None:
                continue
            entry.sequence.num_computed = planned.start + planned.num_tokens
            if planned.samples:
                assert planned.request_id in sampled, f"{planned.request_id} got no token"
                results.append(self._append(entry, sampled[planned.request_id]))
        return results

    def check_integrity(self) -> None:
        """Assert that every KV block is free or has one owner, and that the tables suffice."""
        self._allocator.check_integrity()
        owned = [block for entry in self._running.values() for block in entry.block_table]
        assert len(set(owned)) == len(owned), "a KV block has two owners"
        assert not any(map(self._allocator.is_free, owned)), "a KV block in use counts as free"
        assert len(owned) + self.num_free_blocks == self._allocator.num_blocks, "KV blocks leaked"
        assert self.num_running <= self._max_sequences
        assert self._planned.items() <= self._running.items()
        for request_id, entry in self._running.items():
            covered = len(entry.block_table) * self.block_size
            assert covered >= entry.sequence.num_computed, f"{request_id} outgrew its block table"
            assert entry.num_unfed > 0, f"{request_id} has nothing left to feed"
        for request_id, entry in self._waiting.items():
            assert not entry.block_table, f"{request_id} waits with KV blocks"
            assert entry.sequence.num_computed == 0, f"{request_id} waits half computed"

    def _plan_decodes(self) -> tuple[list[SequencePlan], list[str]]:
        """One token for every decoding sequence, and the requests that were preempted for them."""
        planned: list[SequencePlan] = []
        preempted: list[str] = []
        for request_id, entry in list(self._running.items()):
            if entry.num_unfed > 1:
                continue
            # The latest arrival is preempted: this sequence or a later one, so never one that is
            # planned already.
            while request_id in self._running:
                if self._grow(entry):
                    planned.append(_sequence_plan(entry, 1))
                    break
                preempted.append(self._preempt_latest())
        return planned, preempted

    def _plan_prefills(self, budget: int) -> list[SequencePlan]:
        """Chunks of the running sequences that are not decoding yet, at most `budget` tokens."""
        planned: list[SequencePlan] = []
        for entry in self._running.values():
            if entry.num_unfed > 1 and budget > 0:
                planned.append(_sequence_plan(entry, min(entry.num_unfed, budget)))
                budget -= planned[-1].num_tokens
        return planned

    def _admit(self, budget: int) -> list[SequencePlan]:
        """Move waiting sequences to the running ones and plan their first chunks."""
        planned: list[SequencePlan] = []
        num_growing = sum(map(self._may_grow, self._running.values()))
        while self._waiting and budget > 0 and self.num_running < self._max_sequences:
            request_id, entry = next(iter(self._waiting.items()))
            num_blocks = self._num_blocks(min(entry.sequence.num_tokens + 1, entry.max_fed))
            num_growing += num_blocks < self._num_blocks(entry.max_fed)
            if num_blocks + num_growing > self.num_free_blocks:
                break
            blocks = self._allocator.allocate(num_blocks)
            assert blocks is not None, "fewer KV blocks are free than counted"
            entry.block_table = blocks
            self._running[request_id] = self._waiting.pop(request_id)
            planned.append(_sequence_plan(entry, min(entry.num_unfed, budget)))
            budget -= planned[-1].num_tokens
        return planned

    def _grow(self, entry: _Entry) -> bool:
        """Make room for the next token of a decoding sequence; false if no block is free."""
        table = entry.block_table
        if entry.sequence.num_tokens <= len(table) * self.block_size:
            return True
        grown = self._allocator.allocate(1, after=table[-1])
        table += grown or []
        return grown is not None

    def _preempt_latest(self) -> str:
        """Free the KV blocks of the latest arrival and put it in front of the queue."""
        request_id, entry = self._running.popitem()
        self._release(entry)
        entry.sequence.num_computed = 0
        self._waiting[request_id] = entry
        self._waiting.move_to_end(request_id, last=False)
        self.num_preemptions += 1
        return request_id

    def _append(self, entry: _Entry, token_id: int) -> SampledToken:
        """Give a sequence its sampled token, and end it where that was the last."""
        sequence = entry.sequence
        sequence.output_ids.append(token_id)
        finish_reason = None
        if token_id in sequence.params.stop_token_ids:
            finish_reason = FinishReason.STOP
        elif len(sequence.output_ids) == sequence.params.max_tokens:
            finish_reason = FinishReason.LENGTH
        if finish_reason is not None:
            self._remove(entry)
        return SampledToken(
            request_id=sequence.request_id, token_id=token_id, finish_reason=finish_reason
        )

    def _remove(self, entry: _Entry) -> None:
        for entries in (self._running, self._waiting, self._planned):
            entries.pop(entry.sequence.request_id, None)
        self._release(entry)

    def _release(self, entry: _Entry) -> None:
        self._allocator.free(entry.block_table)
        entry.block_table = []

    def _may_grow(self, entry: _Entry) -> bool:
        return len(entry.block_table) < self._num_blocks(entry.max_fed)

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)


def _sequence_plan(entry: _Entry, num_tokens: int) -> SequencePlan:
    """Feed the next `num_tokens` tokens of a sequence whose block table covers them."""
    sequence = entry.sequence
    start = sequence.num_computed
    return SequencePlan(
        request_id=sequence.request_id,
        start=start,
        num_tokens=num_tokens,
        token_ids=tuple(sequence.tokens(start, start + num_tokens)),
        block_table=tuple(entry.block_table),
        samples=num_tokens == entry.num_unfed,
    )


def _split_lanes(
    planned: list[SequencePlan], max_lanes: int
) -> tuple[tuple[SequencePlan, ...], ...]:
    """Spread sequences over lanes: largest first, each to the lane with the fewest tokens.

    Inside a lane they keep their order; with at least one token each, no lane stays empty.
    """
    lanes: list[list[int]] = [[] for _ in range(min(max_lanes, len(planned)))]
    lane_tokens = [0] * len(lanes)
    for index in sorted(range(len(planned)), key=lambda at: -planned[at].num_tokens):
        lane = lane_tokens.index(min(lane_tokens))
        lanes[lane].append(index)
        lane_tokens[lane] += planned[index].num_tokens
    return tuple(tuple(planned[index] for index in sorted(lane)) for lane in lanes)
