"""KV blocks: nothing leaks, nothing is shared, and sequences stay adjacent where they can."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from janus_scheduler.kv_blocks import BlockAllocator, block_runs


def test_block_runs_by_hand() -> None:
    assert block_runs([]) == []
    assert block_runs([7]) == [(7, 1)]
    assert block_runs([3, 4, 5, 9, 2, 3]) == [(3, 3), (9, 1), (2, 2)]
    assert block_runs((5, 4)) == [(5, 1), (4, 1)]


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(0, 6)))
def test_block_runs_spell_the_blocks_and_are_maximal(blocks: list[int]) -> None:
    runs = block_runs(blocks)
    assert [block for first, count in runs for block in range(first, first + count)] == blocks
    assert all(
        first + count != next_first for (first, count), (next_first, _) in itertools.pairwise(runs)
    )


def test_fresh_allocations_leave_room_to_grow() -> None:
    allocator = BlockAllocator(16)
    assert allocator.allocate(4) == [0, 1, 2, 3]
    # 4 to 15 are free: four blocks in their middle leave four on each side.
    assert allocator.allocate(4) == [8, 9, 10, 11]
    # Both sides are equally large; the lower one is taken, and its middle is 5.
    assert allocator.allocate(1) == [5]
    assert allocator.allocate(1, after=3) == [4]
    assert allocator.allocate(2, after=11) == [12, 13]
    assert allocator.num_free == 4
    allocator.check_integrity()


def test_growth_goes_elsewhere_once_the_next_block_is_taken() -> None:
    allocator = BlockAllocator(8)
    assert allocator.allocate(2) == [0, 1]
    assert allocator.allocate(2) == [4, 5]
    assert allocator.allocate(3, after=1) == [2, 3, 6]
    assert allocator.allocate(1, after=3) == [7]
    assert allocator.allocate(1, after=7) is None


def test_all_or_nothing() -> None:
    allocator = BlockAllocator(4)
    assert allocator.allocate(5) is None
    assert allocator.num_free == 4
    assert allocator.allocate(0) == []
    assert allocator.allocate(4) == [0, 1, 2, 3]
    assert allocator.allocate(1) is None
    assert BlockAllocator(0).allocate(1) is None


def test_a_fragmented_pool_gives_the_fewest_runs() -> None:
    allocator = BlockAllocator(12)
    allocator.allocate(12)
    allocator.free([1, 3, 4, 6, 7, 8, 10])
    assert allocator.allocate(5) == [6, 7, 8, 3, 4]
    assert allocator.allocate(2) == [1, 10]


def test_freed_neighbours_become_one_run_again() -> None:
    allocator = BlockAllocator(5000)
    blocks = [block for _ in range(5000) for block in allocator.allocate(1) or []]
    assert sorted(blocks) == list(range(5000))
    for block in blocks[::2] + blocks[1::2]:
        allocator.free([block])
    allocator.check_integrity()
    assert allocator.allocate(5000) == list(range(5000))


@pytest.mark.parametrize("blocks", [[2], [0, 2], [0, 0], [-1], [4], [3, 4]])
def test_freeing_what_is_not_allocated_is_an_error(blocks: list[int]) -> None:
    allocator = BlockAllocator(4)
    allocator.allocate(4)
    allocator.free([2])
    with pytest.raises(AssertionError, match=r"unknown|not all allocated"):
        allocator.free(blocks)


def test_growing_from_a_free_block_is_an_error() -> None:
    with pytest.raises(AssertionError, match="nothing to extend"):
        BlockAllocator(4).allocate(1, after=2)


class AllocatorMachine(RuleBasedStateMachine):
    """Sequences come, grow and go, in any order, beside a plain set of the free blocks."""

    NUM_BLOCKS = 24

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(self.NUM_BLOCKS)
        self.twin = BlockAllocator(self.NUM_BLOCKS)
        self.free_blocks = set(range(self.NUM_BLOCKS))
        self.tables: list[list[int]] = []

    def fewest_runs(self, num: int) -> int:
        lengths = sorted((count for _, count in block_runs(sorted(self.free_blocks))), reverse=True)
        needed = 0
        while num > 0:
            num -= lengths[needed]
            needed += 1
        return needed

    def take(self, num: int, after: int | None) -> list[int] | None:
        blocks = self.allocator.allocate(num, after)
        assert blocks == self.twin.allocate(num, after)
        assert (blocks is None) == (num > len(self.free_blocks))
        if blocks is not None:
            assert len(blocks) == len(set(blocks)) == num
            assert self.free_blocks >= set(blocks)
        return blocks

    @rule(num=st.integers(1, 10))
    def start(self, num: int) -> None:
        blocks = self.take(num, None)
        if blocks is not None:
            assert len(block_runs(blocks)) == self.fewest_runs(num)
            self.free_blocks -= set(blocks)
            self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), num=st.integers(1, 3))
    def grow(self, data: st.DataObject, num: int) -> None:
        table = data.draw(st.sampled_from(self.tables))
        blocks = self.take(num, table[-1])
        if blocks is not None:
            assert blocks[0] == table[-1] + 1 or table[-1] + 1 not in self.free_blocks
            assert len(block_runs([table[-1], *blocks])) <= 1 + self.fewest_runs(num)
            self.free_blocks -= set(blocks)
            table += blocks

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        table = data.draw(st.permutations(table))
        self.allocator.free(table)
        self.twin.free(table)
        self.free_blocks |= set(table)

    @invariant()
    def nothing_leaks(self) -> None:
        self.allocator.check_integrity()
        assert self.allocator.num_free == len(self.free_blocks)
        assert {
            block for block in range(self.NUM_BLOCKS) if self.allocator.is_free(block)
        } == self.free_blocks


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(
    derandomize=True, deadline=None, max_examples=60, stateful_step_count=40
)
