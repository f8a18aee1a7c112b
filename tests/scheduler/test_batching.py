"""Batching: every request gets its own tokens, whatever else runs, however small the pool.

A `Rig` drives a batcher as an engine would and checks every plan against plain models of the
requests and of the KV slots. The model writes token t of a request as `t + 1000 * request`, t its
position, so that expected outputs are known beforehand.
"""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from janus_scheduler.batching import Batcher, SequencePlan, StepPlan
from janus_scheduler.kv_blocks import block_runs
from janus_scheduler.request import FinishReason, SamplingParams, Sequence


@dataclass
class Rig:
    """A batcher, and what should become of its requests."""

    max_batch_tokens: int = 8
    max_sequences: int = 4
    block_size: int = 2
    num_blocks: int = 16
    max_lanes: int = 1
    alive: dict[str, Sequence] = field(default_factory=dict)
    """Requests that neither finished nor were aborted, in order of arrival."""
    running: list[str] = field(default_factory=list)
    computed: dict[str, int] = field(default_factory=dict)
    finished: dict[str, FinishReason] = field(default_factory=dict)
    sequences: list[Sequence] = field(default_factory=list)
    kv_slots: dict[int, tuple[str, int]] = field(default_factory=dict)
    """Slot -> (request, position) last written."""
    steps_since_admission: int = 0
    plan: StepPlan | None = None

    def __post_init__(self) -> None:
        self.batcher = Batcher(
            max_batch_tokens=self.max_batch_tokens,
            max_sequences=self.max_sequences,
            block_size=self.block_size,
            num_blocks=self.num_blocks,
            max_lanes=self.max_lanes,
        )

    def add(self, num_prompt: int, max_tokens: int, stop_at: int | None = None) -> str:
        """Queue a request; `stop_at` is the position of a token that ends it."""
        number = len(self.sequences)
        stop = frozenset() if stop_at is None else frozenset({1000 * number + stop_at})
        sequence = Sequence(
            request_id=f"r{number}",
            prompt_ids=tuple(range(1000 * number, 1000 * number + num_prompt)),
            params=SamplingParams(max_tokens=max_tokens, stop_token_ids=stop),
        )
        self.sequences.append(sequence)
        self.alive[sequence.request_id] = sequence
        self.computed[sequence.request_id] = 0
        self.batcher.add(sequence)
        return sequence.request_id

    def abort(self, request_id: str) -> None:
        """Drop a request; its blocks are free at once."""
        free = self.batcher.num_free_blocks
        runs = request_id in self.running
        assert self.batcher.abort(request_id) == (request_id in self.alive)
        assert (self.batcher.num_free_blocks > free) == runs
        assert not self.batcher.abort(request_id)
        self.forget(request_id)

    def forget(self, request_id: str) -> None:
        self.alive.pop(request_id, None)
        if request_id in self.running:
            self.running.remove(request_id)

    def decide(self) -> StepPlan | None:
        """Plan a step and hold the plan against every rule."""
        before = list(self.running)
        decoding = {name for name in before if self.num_unfed(name) == 1}
        self.plan = plan = self.batcher.plan()
        assert (plan is None) == (not self.alive)
        if plan is None:
            return None
        planned = [sequence.request_id for sequence in plan.sequences]
        assert len(planned) == len(set(planned)) <= self.max_sequences
        assert 1 <= plan.num_tokens == sum(plan.lane_tokens) <= self.max_batch_tokens
        assert len(plan.lanes) == min(self.max_lanes, len(planned))
        assert all(plan.lanes)
        # The latest arrivals lose their blocks, and no other request comes in their place.
        assert list(plan.preempted) == before[::-1][: len(plan.preempted)]
        assert not plan.preempted or set(planned) <= set(before)
        assert not plan.preempted or self.steps_since_admission >= self.block_size
        for request_id in plan.preempted:
            self.computed[request_id] = 0
        # All that run are fed in every step, and they are the first to have arrived.
        assert set(planned) == set(list(self.alive)[: len(planned)])
        assert set(planned) >= set(before) - set(plan.preempted)
        self.running = list(self.alive)[: len(planned)]
        assert self.batcher.num_running == len(self.running)
        assert self.batcher.num_waiting == len(self.alive) - len(self.running)
        assert decoding & set(planned) == decoding - set(plan.preempted)
        self.steps_since_admission *= set(self.running) <= set(before)
        for sequence in plan.sequences:
            self.check_sequence(sequence)
        return plan

    def check_sequence(self, planned: SequencePlan) -> None:
        """The right tokens, over blocks that hold what this request wrote before."""
        sequence = self.alive[planned.request_id]
        stop = planned.start + planned.num_tokens
        assert planned.start == self.computed[planned.request_id]
        assert list(planned.token_ids) == sequence.tokens(planned.start, stop)
        assert len(planned.token_ids) == planned.num_tokens >= 1
        assert planned.samples == (stop == sequence.num_tokens)
        size = self.block_size
        slots = [block * size + at for block in planned.block_table for at in range(size)]
        for position, slot in enumerate(slots[: planned.start]):
            assert self.kv_slots[slot] == (planned.request_id, position)
        for position in range(planned.start, stop):
            self.kv_slots[slots[position]] = (planned.request_id, position)

    def act(self) -> None:
        """Complete the plan, with the token that every request should sample."""
        assert self.plan is not None
        sampled: dict[str, int] = {}
        for planned in self.plan.sequences:
            stop = planned.start + planned.num_tokens
            if planned.samples:
                sampled[planned.request_id] = 1000 * int(planned.request_id[1:]) + stop
            if planned.request_id in self.alive:
                self.computed[planned.request_id] = stop
        results = self.batcher.complete(self.plan, sampled)
        self.steps_since_admission += 1
        self.plan = None
        assert {result.request_id: result.token_id for result in results} == {
            request_id: token for request_id, token in sampled.items() if request_id in self.alive
        }
        for result in results:
            if result.finish_reason is not None:
                self.finished[result.request_id] = result.finish_reason
                self.forget(result.request_id)
        assert self.batcher.num_running == len(self.running)
        self.batcher.check_integrity()

    def num_unfed(self, request_id: str) -> int:
        return self.alive[request_id].num_tokens - self.computed[request_id]

    def step(self) -> StepPlan | None:
        """Decide, then act."""
        plan = self.decide()
        if plan is not None:
            self.act()
        return plan

    def drain(self) -> None:
        """Run everything to its end; each request gets its own tokens and no others."""
        for _ in range(10_000):
            if self.step() is None:
                break
        assert not self.alive
        assert self.batcher.num_free_blocks == self.num_blocks
        self.batcher.check_integrity()
        for number, sequence in enumerate(self.sequences):
            first = len(sequence.prompt_ids)
            outputs = range(first, first + len(sequence.output_ids))
            assert sequence.output_ids == [1000 * number + at for at in outputs]
            if sequence.request_id in self.finished:
                self.check_finished(sequence, self.finished[sequence.request_id])

    def check_finished(self, sequence: Sequence, reason: FinishReason) -> None:
        last = sequence.output_ids[-1]
        assert (reason is FinishReason.STOP) == (last in sequence.params.stop_token_ids)
        if reason is FinishReason.LENGTH:
            assert len(sequence.output_ids) == sequence.params.max_tokens


def shape(plan: StepPlan | None) -> list[tuple[str, int, int, bool]]:
    """(request, start, tokens, whether it samples) of all sequences."""
    assert plan is not None
    return [
        (sequence.request_id, sequence.start, sequence.num_tokens, sequence.samples)
        for sequence in plan.sequences
    ]


def test_prompts_are_fed_in_chunks_that_fill_the_budget() -> None:
    rig = Rig(max_batch_tokens=4)
    rig.add(6, 2)
    rig.add(3, 1)
    assert shape(rig.step()) == [("r0", 0, 4, False)]
    assert shape(rig.step()) == [("r0", 4, 2, True), ("r1", 0, 2, False)]
    assert shape(rig.step()) == [("r0", 6, 1, True), ("r1", 2, 1, True)]
    assert rig.step() is None
    assert rig.finished == {"r0": FinishReason.LENGTH, "r1": FinishReason.LENGTH}
    assert rig.sequences[0].output_ids == [6, 7]


def test_a_long_prefill_takes_what_the_decodes_leave() -> None:
    rig = Rig(max_batch_tokens=4, num_blocks=40)
    rig.add(2, 9)
    rig.step()
    rig.add(20, 1)
    for step in range(6):
        assert shape(rig.step()) == [("r0", 2 + step, 1, True), ("r1", 3 * step, 3, False)]


def test_a_later_decode_goes_before_an_earlier_prefill() -> None:
    rig = Rig(max_batch_tokens=4, num_blocks=40)
    rig.add(5, 1)
    rig.add(1, 9)
    rig.add(9, 1)
    assert shape(rig.step()) == [("r0", 0, 4, False)]
    assert shape(rig.step()) == [("r0", 4, 1, True), ("r1", 0, 1, True), ("r2", 0, 2, False)]
    assert shape(rig.step()) == [("r1", 1, 1, True), ("r2", 2, 3, False)]


def test_more_never_run_than_the_budget_has_tokens() -> None:
    rig = Rig(max_batch_tokens=3, max_sequences=8, num_blocks=64)
    for _ in range(6):
        rig.add(1, 4)
    rig.step()
    assert (rig.batcher.num_running, rig.batcher.num_waiting) == (3, 3)
    rig.drain()


def test_max_sequences_bounds_those_that_run() -> None:
    rig = Rig(max_sequences=2)
    for _ in range(3):
        rig.add(1, 1)
    assert [request_id for request_id, *_ in shape(rig.step())] == ["r0", "r1"]
    assert [request_id for request_id, *_ in shape(rig.step())] == ["r2"]


def test_stop_tokens_end_a_request_and_free_its_blocks() -> None:
    rig = Rig()
    rig.add(3, 9, stop_at=4)
    rig.step()
    assert rig.finished == {}
    rig.step()
    assert rig.finished == {"r0": FinishReason.STOP}
    assert rig.sequences[0].output_ids == [3, 4]
    assert rig.batcher.num_free_blocks == rig.num_blocks


def test_the_last_token_needs_no_room() -> None:
    rig = Rig(num_blocks=2)
    rig.add(1, 4)
    rig.drain()
    with pytest.raises(AssertionError, match="fits no pool of 2 blocks"):
        rig.add(1, 5)


def test_preemption_by_hand() -> None:
    rig = Rig(num_blocks=6)
    rig.add(2, 11)
    rig.add(2, 11)
    # Two blocks each at first; one more each in the fourth step, for position 4.
    for position in (0, 2, 3, 4, 5):
        plan = rig.step()
        assert [(request_id, start) for request_id, start, *_ in shape(plan)] == [
            ("r0", position),
            ("r1", position),
        ]
    assert rig.batcher.num_free_blocks == 0
    # Position 6 lacks a block: the later request gives up its three.
    plan = rig.step()
    assert plan is not None
    assert plan.preempted == ("r1",)
    assert shape(plan) == [("r0", 6, 1, True)]
    assert (rig.batcher.num_running, rig.batcher.num_waiting) == (1, 1)
    assert (rig.batcher.num_free_blocks, rig.batcher.num_preemptions) == (2, 1)
    # It waits until there is room for what it has and then some, before those who came after it.
    rig.add(1, 1)
    for _ in range(5):
        assert [request_id for request_id, *_ in shape(rig.step())] == ["r0"]
    # All seven tokens are fed again, but nothing that was sampled is sampled again.
    assert "r0" in rig.finished
    assert shape(rig.step()) == [("r1", 0, 7, True), ("r2", 0, 1, True)]
    rig.drain()
    assert rig.batcher.num_preemptions == 1


def test_the_request_in_need_is_preempted_if_it_came_last() -> None:
    rig = Rig(num_blocks=8)
    rig.add(4, 9)
    rig.add(3, 9)
    while (plan := rig.step()) is not None and not plan.preempted:
        pass
    assert plan is not None
    assert plan.preempted == ("r1",)
    rig.drain()


@pytest.mark.parametrize(("num_blocks", "num_running"), [(6, 1), (7, 2)])
def test_admission_leaves_every_running_sequence_a_block(num_blocks: int, num_running: int) -> None:
    rig = Rig(num_blocks=num_blocks)
    rig.add(2, 9)
    rig.add(5, 6)
    # Two blocks for r0, three for r1, and one more for each of them to come: seven in all.
    rig.step()
    assert rig.batcher.num_running == num_running
    rig.drain()


def test_sequences_stay_adjacent_where_there_is_room() -> None:
    rig = Rig(max_batch_tokens=64, max_sequences=8, block_size=4, num_blocks=512)
    for length in range(1, 9):
        rig.add(length, 40)
    while (plan := rig.step()) is not None:
        assert all(len(block_runs(sequence.block_table)) == 1 for sequence in plan.sequences)


def test_lanes_are_balanced_and_keep_their_order() -> None:
    rig = Rig(max_batch_tokens=12, max_lanes=2)
    for length in (1, 3, 5, 3):
        rig.add(length, 2)
    plan = rig.step()
    assert plan is not None
    lanes = [[sequence.request_id for sequence in lane] for lane in plan.lanes]
    assert lanes == [["r0", "r2"], ["r1", "r3"]]
    assert plan.lane_tokens == (6, 6)
    assert plan.num_tokens == 12


def test_a_lone_sequence_takes_one_lane() -> None:
    rig = Rig(max_lanes=4)
    rig.add(3, 1)
    plan = rig.step()
    assert plan is not None
    assert plan.lane_tokens == (3,)


def test_a_dropped_plan_is_made_again() -> None:
    rig = Rig()
    rig.add(3, 3)
    rig.step()
    first, second = rig.decide(), rig.decide()
    assert first is not None
    assert second is not None
    assert second.number == first.number + 1
    assert second.lanes == first.lanes
    with pytest.raises(AssertionError, match="over or was replaced"):
        rig.batcher.complete(first, {"r0": 1003})
    rig.act()
    with pytest.raises(AssertionError, match="over or was replaced"):
        rig.batcher.complete(second, {"r0": 1004})


def test_abort_between_plan_and_complete() -> None:
    rig = Rig()
    rig.add(3, 3)
    rig.add(3, 3)
    rig.decide()
    rig.abort("r0")
    rig.act()
    assert rig.sequences[0].output_ids == []
    # A new request under the name of an aborted one gets nothing of that one's step.
    plan = rig.decide()
    assert plan is not None
    rig.batcher.abort("r1")
    reborn = Sequence(request_id="r1", prompt_ids=(9,), params=SamplingParams(max_tokens=1))
    rig.batcher.add(reborn)
    assert rig.batcher.complete(plan, {"r1": 1004}) == []
    assert (reborn.output_ids, reborn.num_computed) == ([], 0)


def test_abort_of_a_waiting_or_unknown_request() -> None:
    rig = Rig(max_sequences=1)
    rig.add(3, 3)
    rig.add(3, 3)
    rig.step()
    rig.abort("r1")
    assert rig.batcher.num_waiting == 0
    assert not rig.batcher.abort("nobody")
    rig.drain()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"request_id": "r0"}, "is running already"),
        ({"request_id": "r1"}, "is waiting already"),
        ({"prompt_ids": ()}, "has no prompt"),
        ({"output_ids": [5, 6]}, "has all its tokens"),
        ({"num_computed": 1}, "was computed elsewhere"),
    ],
)
def test_add_refuses_what_makes_no_sense(change: dict[str, object], message: str) -> None:
    rig = Rig(max_sequences=1)
    rig.add(1, 3)
    rig.add(1, 3)
    rig.step()
    fields = {"request_id": "x", "prompt_ids": (1,), "params": SamplingParams(max_tokens=2)}
    with pytest.raises(AssertionError, match=message):
        rig.batcher.add(Sequence(**{**fields, **change}))  # type: ignore[arg-type]


def draw_rig(data: st.DataObject) -> Rig:
    return Rig(
        max_batch_tokens=data.draw(st.integers(1, 12), "batch tokens"),
        max_sequences=data.draw(st.integers(1, 6), "sequences"),
        block_size=data.draw(st.integers(1, 4), "block size"),
        num_blocks=data.draw(st.integers(2, 20), "blocks"),
        max_lanes=data.draw(st.integers(1, 3), "lanes"),
    )


def draw_request(data: st.DataObject, rig: Rig) -> tuple[int, int, int | None]:
    """Prompt length, max_tokens and the position of a stop token, as large as the pool allows."""
    capacity = rig.num_blocks * rig.block_size
    num_prompt = data.draw(st.integers(1, capacity), "prompt")
    max_tokens = data.draw(st.integers(1, capacity + 1 - num_prompt), "max_tokens")
    return num_prompt, max_tokens, data.draw(st.none() | st.integers(0, capacity), "stop")


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.data())
def test_all_requests_finish_with_just_their_tokens(data: st.DataObject) -> None:
    rig = draw_rig(data)
    for _ in range(data.draw(st.integers(1, 8), "requests")):
        rig.add(*draw_request(data, rig))
    rig.drain()
    assert len(rig.finished) == len(rig.sequences)


class BatcherMachine(RuleBasedStateMachine):
    """Requests come and go at any time; steps are run, cut short, or lose requests on their way."""

    @initialize(data=st.data())
    def make(self, data: st.DataObject) -> None:
        self.rig = draw_rig(data)

    @rule(data=st.data())
    def add(self, data: st.DataObject) -> None:
        self.rig.add(*draw_request(data, self.rig))

    @precondition(lambda self: self.rig.alive)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.rig.abort(data.draw(st.sampled_from(list(self.rig.alive))))

    @rule()
    def decide(self) -> None:
        self.rig.decide()

    @precondition(lambda self: self.rig.plan is not None)
    @rule()
    def act(self) -> None:
        self.rig.act()

    @precondition(lambda self: self.rig.plan is None)
    @rule(num_steps=st.integers(1, 6))
    def steps(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.rig.step()

    @invariant()
    def nothing_leaks(self) -> None:
        if hasattr(self, "rig"):
            self.rig.batcher.check_integrity()

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            self.rig.drain()


TestBatcher = BatcherMachine.TestCase
TestBatcher.settings = settings(
    derandomize=True, deadline=None, max_examples=200, stateful_step_count=40
)
