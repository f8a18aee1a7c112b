import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from janus_kernels.grouped_gemm import expert_ffn
from janus_kernels.linear import linear, pack_weight, padded_size


def pack_all(weights: torch.Tensor) -> list[torch.Tensor]:
    return [pack_weight(weight) for weight in weights]


def run(x_TH, slots_TK, weights_TK, gate_up, down, first_slot=0):
    """expert_ffn with the token counts that a schedule would give it."""
    num_slots = len(gate_up)
    local_P = slots_TK.flatten() - first_slot
    tokens_C = torch.bincount(local_P[(local_P >= 0) & (local_P < num_slots)], minlength=num_slots)
    packed = pack_all(gate_up), pack_all(down)
    return expert_ffn(x_TH, slots_TK, weights_TK, tokens_C, *packed, first_slot=first_slot)


def test_worked_by_hand() -> None:
    # One hidden value, one intermediate: expert c computes down * silu(gate * x) * up * x.
    x_TH = torch.tensor([[1.0], [2.0]])
    gate_up = torch.tensor([[[1.0], [3.0]], [[1.0], [5.0]]])
    down = torch.tensor([[[2.0]], [[1.0]]])
    slots_TK = torch.tensor([[0, -1], [1, 0]])
    weights_TK = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    silu_1, silu_2 = (value / (1 + torch.tensor(-value).exp()) for value in (1.0, 2.0))
    partial_TH = run(x_TH, slots_TK, weights_TK, gate_up, down)
    expected = [0.5 * 2 * silu_1 * 3, 0.25 * silu_2 * 10 + 0.75 * 2 * silu_2 * 6]
    torch.testing.assert_close(partial_TH.flatten(), torch.stack(expected))


def test_nothing_for_this_worker() -> None:
    weights = torch.ones(1, 4, 2)
    slots_TK = torch.tensor([[0, 2], [0, 2], [2, 0]])
    partial_TH = run(torch.ones(3, 2), slots_TK, torch.ones(3, 2), weights, weights, first_slot=1)
    assert partial_TH.eq(0).all()


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    num_tokens=st.integers(1, 9) | st.integers(30, 140),
    num_slots=st.integers(1, 5),
    top_k=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_equals_one_token_at_a_time(num_tokens: int, num_slots: int, top_k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden, wide = 6, 4
    x_TH = torch.randn(num_tokens, hidden, generator=generator)
    gate_up = torch.randn(num_slots, 2 * wide, hidden, generator=generator)
    down = torch.randn(num_slots, hidden, wide, generator=generator)
    # Slots of the workers before and after as well.
    slots_TK = torch.randint(0, 3 * num_slots, (num_tokens, top_k), generator=generator)
    weights_TK = torch.rand(num_tokens, top_k, generator=generator)
    partial_TH = run(x_TH, slots_TK, weights_TK, gate_up, down, first_slot=num_slots)
    expected_TH = torch.zeros(num_tokens, hidden)
    for token, (slots, weights) in enumerate(zip(slots_TK, weights_TK, strict=True)):
        for slot, weight in zip((slots - num_slots).tolist(), weights, strict=True):
            if 0 <= slot < num_slots:
                gate, up = (gate_up[slot] @ x_TH[token]).chunk(2)
                expected_TH[token] += weight * (down[slot] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(partial_TH, expected_TH, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_tokens", [1, 5, 32, 33, 34, 101])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_linear_equals_plain_linear(dtype: torch.dtype, num_tokens: int) -> None:
    shapes = ((num_tokens, 24), (17, 24), (17,))
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in shapes)
    expected = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(linear(x, pack_weight(weight), bias), expected)


def test_no_row_sees_those_that_pad_it() -> None:
    weight = pack_weight(torch.ones(8, 8))
    x = torch.ones(33, 8)
    x[-1] = torch.nan
    assert linear(x, weight)[:-1].eq(8).all()


@given(st.integers(0, 2**20))
def test_padding_is_little_and_sizes_are_few(num_rows: int) -> None:
    padded = padded_size(num_rows)
    assert num_rows <= padded <= num_rows * 17 / 16
    assert padded_size(padded) == padded
    assert padded <= padded_size(num_rows + 1)


def test_padded_sizes_by_hand() -> None:
    assert list(map(padded_size, (0, 32, 33, 34, 65, 68, 1000))) == [0, 32, 34, 34, 68, 68, 1024]
    assert len({padded_size(num_rows) for num_rows in range(1, 2049)}) == 32 + 6 * 16
