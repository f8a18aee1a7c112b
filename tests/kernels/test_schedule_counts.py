"""The named parts of one packed tensor of counts."""

import torch

from janus_kernels.replica_table import replica_table
from janus_kernels.schedule_counts import ScheduleCounts, empty_counts, zero_counts

# 2 workers of 3 slots.
TABLE = replica_table(
    torch.tensor([[0, -1], [1, 3], [2, 5]], dtype=torch.int32), num_workers=2, slots_per_worker=3
)


def counts_of_a_batch() -> ScheduleCounts:
    counts = empty_counts(TABLE)
    counts.tokens_WC.copy_(torch.tensor([[4, 0, 2], [0, 0, 3]]))
    counts.experts_W.copy_(torch.tensor([2, 1]))
    counts.a_max.fill_(2)
    counts.num_batches.fill_(1)
    return counts


def test_the_parts_fill_the_tensor_and_do_not_overlap() -> None:
    counts = empty_counts(TABLE)
    counts.packed.zero_()
    parts = (counts.tokens_WC, counts.experts_W, counts.a_max, counts.num_batches)
    for part in parts:
        part += 1
    assert counts.packed.tolist() == [1] * 10
    assert [part.numel() for part in parts] == [6, 2, 1, 1]


def test_arrays_are_the_same_parts() -> None:
    tokens_S, experts_W, a_max, num_batches = counts_of_a_batch().numpy_parts()
    assert tokens_S.tolist() == [4, 0, 2, 0, 0, 3]
    assert (experts_W.tolist(), a_max.tolist(), num_batches.tolist()) == ([2, 1], [2], [1])


def test_one_addition_sums_every_part() -> None:
    sums = zero_counts(TABLE)
    sums.add(counts_of_a_batch())
    before = sums.copy_to_cpu()
    sums.add(counts_of_a_batch())
    assert sums.tokens_WC.tolist() == [[8, 0, 4], [0, 0, 6]]
    assert sums.experts_W.tolist() == [4, 2]
    assert (int(sums.a_max), int(sums.num_batches)) == (4, 2)
    assert int(before.num_batches) == 1


def test_sums_outgrow_32_bits() -> None:
    sums = zero_counts(TABLE)
    counts = counts_of_a_batch()
    counts.tokens_WC.fill_(2**31 - 1)
    sums.add(counts)
    sums.add(counts)
    assert sums.tokens_WC[0, 0] == 2 * (2**31 - 1)
