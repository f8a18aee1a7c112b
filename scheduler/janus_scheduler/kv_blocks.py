"""Which KV blocks are free, handed out so that a sequence's blocks stay adjacent where they can.

CPU attention reads the keys and values of a sequence as views over runs of adjacent blocks: fewer
runs, fewer products. So a growing sequence takes the block right after its last one, and a fresh
allocation goes where there is room to grow: the middle of the largest free run, which leaves half
of the room to the sequence before it. Fragments never make an allocation fail.

Invariants: the free blocks are exactly the union of the free runs; free runs never touch; the heap
holds every free run, beside stale entries whose number stays in proportion to that of the runs.
"""

import heapq
from collections.abc import Sequence

_HEAP_SLACK = 64
"""Stale heap entries that are tolerated even in a small pool, so that rebuilding stays rare."""


def block_runs(blocks: Sequence[int]) -> list[tuple[int, int]]:
    """(first block, number of blocks) of the maximal stretches n, n+1, ... in sequence order."""
    runs: list[tuple[int, int]] = []
    if not blocks:
        return runs
    first = end = blocks[0]
    for block in blocks:
        if block != end:
            runs.append((first, end - first))
            first = block
        end = block + 1
    runs.append((first, end - first))
    return runs


class BlockAllocator:
    """Hands out the KV blocks 0 to `num_blocks`; the same calls always give the same blocks.

    A call costs microseconds for each run of blocks that it touches, however large the pool.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 0, f"a pool of {num_blocks} blocks"
        self.num_blocks = num_blocks
        self._num_free = 0
        # Per block, 1: allocated.
        self._allocated = bytearray(b"\x01" * num_blocks)
        # Both ends of every free run, so that a freed neighbour finds it.
        self._end_of: dict[int, int] = {}
        self._start_of: dict[int, int] = {}
        # (-length, start): the largest run first, the lowest of equals.
        self._by_length: list[tuple[int, int]] = []
        self.free(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return self._num_free

    def is_free(self, block: int) -> bool:
        """Whether nobody holds this block of the pool."""
        return not self._allocated[block]

    def allocate(self, num: int, after: int | None = None) -> list[int] | None:
        """Take `num` blocks in as few runs as possible; None, taking nothing, if too few are free.

        `after` is the last block of the sequence that grows; blocks adjacent to it come first.
        """
        assert num >= 0, f"an allocation of {num} blocks"
        assert after is None or self._allocated[after], f"block {after} is free: nothing to extend"
        if num > self._num_free:
            return None
        blocks: list[int] = []
        if after is not None and num > 0 and after + 1 in self._end_of:
            start = after + 1
            blocks += self._take(start, start, min(num, self._end_of[start] - start))
        while len(blocks) < num:
            blocks += self._take_fresh(num - len(blocks))
        return blocks

    def free(self, blocks: Sequence[int]) -> None:
        """Give blocks back, in any order; each must be allocated."""
        for start, count in block_runs(blocks):
            end = start + count
            assert start >= 0, f"block {start} is unknown"
            assert end <= self.num_blocks, f"block {end - 1} is unknown"
            assert all(self._allocated[start:end]), f"{start} to {end} are not all allocated"
            self._allocated[start:end] = bytes(count)
            self._num_free += count
            # The neighbours' outer ends become those of the joined run.
            start = self._start_of.pop(start, start)
            end = self._end_of.pop(end, end)
            self._add_run(start, end)

    def check_integrity(self) -> None:
        """Assert the invariants of the module; walks the whole pool."""
        assert self._start_of == {end: start for start, end in self._end_of.items()}
        queued = set(self._by_length)
        for start, end in self._end_of.items():
            assert 0 <= start < end <= self.num_blocks, f"free run {start} to {end} is out of range"
            assert end not in self._end_of, f"two free runs touch at block {end}"
            assert not any(self._allocated[start:end]), f"free run {start} to {end} is in use"
            assert (start - end, start) in queued, f"free run {start} to {end} cannot be found"
        in_runs = sum(end - start for start, end in self._end_of.items())
        assert in_runs == self._num_free == self._allocated.count(0), "free blocks were lost"

    def _take_fresh(self, num: int) -> list[int]:
        """Take up to `num` blocks of the largest free run, with room before and behind."""
        start, end = self._largest_run()
        count = min(num, end - start)
        # Nobody grows into a run that begins the pool.
        room_before = 0 if start == 0 else (end - start - count) // 2
        return self._take(start, start + room_before, count)

    def _take(self, run_start: int, first: int, count: int) -> list[int]:
        """Take `count` blocks from `first` on out of the free run that begins at `run_start`."""
        run_end = self._end_of.pop(run_start)
        del self._start_of[run_end]
        if run_start < first:
            self._add_run(run_start, first)
        if first + count < run_end:
            self._add_run(first + count, run_end)
        self._allocated[first : first + count] = b"\x01" * count
        self._num_free -= count
        return list(range(first, first + count))

    def _largest_run(self) -> tuple[int, int]:
        while True:
            negative_length, start = self._by_length[0]
            end = start - negative_length
            if self._end_of.get(start) == end:
                return start, end
            # This run was taken or joined since; a heap cannot drop entries from its middle.
            heapq.heappop(self._by_length)

    def _add_run(self, start: int, end: int) -> None:
        self._end_of[start] = end
        self._start_of[end] = start
        if len(self._by_length) > 2 * len(self._end_of) + _HEAP_SLACK:
            self._by_length = [(first - last, first) for first, last in self._end_of.items()]
            heapq.heapify(self._by_length)
        else:
            heapq.heappush(self._by_length, (start - end, start))
