import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from janus_kernels.norm import rms_norm
from janus_kernels.paged_attention import paged_attention, sequence_span, write_kv
from janus_kernels.rotary import apply_rotary, rotary_tables

CPU = torch.device("cpu")


def test_worked_by_hand() -> None:
    # Two keys with scores 0 and ln 3 (head dimension 1): weights 1/4 and 3/4.
    k_MSD = torch.tensor([[[0.0], [math.log(3.0)]]])
    v_MSD = torch.tensor([[[4.0], [8.0]]])
    span = sequence_span(first_token=0, num_new=1, runs=[(0, 2)], device=CPU)
    out = paged_attention(torch.ones(1, 1, 1), k_MSD, v_MSD, [span])
    torch.testing.assert_close(out, torch.tensor([[7.0]]))


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.data())
def test_equals_plain_attention_over_scattered_blocks(data: st.DataObject) -> None:
    kv_heads, groups, dim, block = 2, data.draw(st.sampled_from([1, 3])), 8, 4
    length = st.integers(1, 17) | st.integers(30, 70)
    lengths = data.draw(st.lists(length, min_size=1, max_size=3))
    news = [data.draw(st.integers(1, length)) for length in lengths]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    blocks = torch.randperm(60, generator=generator).tolist()
    k_MSD, v_MSD = torch.zeros(2, kv_heads, 60 * block, dim).unbind()
    spans, queries, expected = [], [], []
    for length, new in zip(lengths, news, strict=True):
        own = [blocks.pop() for _ in range(-(-length // block))]
        slots = [own[at // block] * block + at % block for at in range(length)]
        keys, values = torch.randn(2, length, kv_heads, dim, generator=generator).unbind()
        write_kv(k_MSD, torch.tensor(slots), keys)
        write_kv(v_MSD, torch.tensor(slots), values)
        runs = [(first * block, min(block, length - i * block)) for i, first in enumerate(own)]
        spans.append(sequence_span(first_token=len(queries), num_new=new, runs=runs, device=CPU))
        q_TND = torch.randn(new, kv_heads * groups, dim, generator=generator)
        queries += q_TND
        keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
        scores = torch.einsum("tnd,lnd->ntl", q_TND, keys) / math.sqrt(dim)
        allowed = torch.ones(new, length).tril(length - new).bool()
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        expected += torch.einsum("ntl,lnd->tnd", weights, values)
    out = paged_attention(torch.stack(queries), k_MSD, v_MSD, spans)
    torch.testing.assert_close(out, torch.stack(expected).flatten(1), rtol=1e-4, atol=1e-5)


def test_rms_norm_by_hand() -> None:
    x = torch.tensor([[3.0, 4.0]])
    expected = x / math.sqrt(12.5) * torch.tensor([1.0, 2.0])
    torch.testing.assert_close(rms_norm(x, torch.tensor([1.0, 2.0]), 0.0), expected)


def test_rotary_by_hand() -> None:
    cos_PD, sin_PD = rotary_tables(
        torch.tensor([1.5]), factor=3.0, max_context=4, dtype=torch.float32
    )
    rotated = apply_rotary(torch.tensor([[[1.0, 2.0]]]), cos_PD[2:3], sin_PD[2:3])
    cos, sin = math.cos(3.0), math.sin(3.0)
    torch.testing.assert_close(rotated[0, 0], 3 * torch.tensor([cos - 2 * sin, sin + 2 * cos]))


def test_rotary_turns_complex_numbers_by_their_angles() -> None:
    inverse_frequencies_C = torch.tensor([1.0, 0.1, 0.01])
    cos_PD, sin_PD = rotary_tables(inverse_frequencies_C, max_context=9, dtype=torch.float32)
    assert cos_PD.shape == sin_PD.shape == (9, 6)
    x_TND = torch.randn(4, 2, 6, generator=torch.Generator().manual_seed(0))
    positions_T = torch.tensor([0, 3, 3, 8])
    rotated_TND = apply_rotary(x_TND, cos_PD[positions_T], sin_PD[positions_T])
    angles_TC = torch.outer(positions_T.float(), inverse_frequencies_C)
    turn_T1C = torch.polar(torch.ones_like(angles_TC), angles_TC)[:, None]
    expected_TNC = torch.complex(*x_TND.chunk(2, dim=-1)) * turn_T1C
    expected_TND = torch.cat([expected_TNC.real, expected_TNC.imag], dim=-1)
    torch.testing.assert_close(rotated_TND, expected_TND)
