"""Causal attention of the new tokens of several sequences over their KV blocks.

Shapes: T new tokens of all sequences in a row, N query heads, M KV heads (N a multiple of M),
D head dimension, S slots of the cache, L tokens of one sequence's context.

The cache of a layer is [M, S, D]: heads outside, so that a run of adjacent KV blocks is a plain
view of each head and needs no gather. The allocator keeps the blocks of a sequence adjacent where
it can; a sequence in several runs costs a copy of its keys and values. This layout matters more for
speed than the kernel does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

_TILE = 32
"""Tokens and context of a prefill are padded to multiples of it. On CPUs with AMX, torch keeps the
compiled product of every bf16 shape for good: attention grew by 1.2 GiB in 10,000 mixed chunks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceSpan:
    """Where one sequence of a step stands; the same for all layers."""

    first_token: int
    """Row of its first new token in the step."""
    num_new: int
    """Its new tokens; they are the last of its context."""
    runs: tuple[tuple[int, int], ...]
    """(first slot, number of slots) of its context, new tokens included, in order."""
    mask: torch.Tensor | None
    """Bool, true where a new token may look: [num_new, L], both rounded up to tiles; None: not
    needed."""


def sequence_span(
    *,
    first_token: int,
    num_new: int,
    runs: Sequence[tuple[int, int]],
    device: torch.device,
) -> SequenceSpan:
    """Describe a sequence; the mask is built only for a chunk that continues earlier ones."""
    context = sum(length for _, length in runs)
    mask = None
    if 1 < num_new < context:
        shape = (num_new + _padding(num_new), context + _padding(context))
        mask = torch.ones(shape, dtype=torch.bool, device=device).tril_(context - num_new)
    return SequenceSpan(first_token=first_token, num_new=num_new, runs=tuple(runs), mask=mask)


def paged_attention(
    q_TND: torch.Tensor,
    k_cache_MSD: torch.Tensor,
    v_cache_MSD: torch.Tensor,
    spans: Sequence[SequenceSpan],
) -> torch.Tensor:
    """Return [T, N*D]; keys and values of the new tokens are already in the cache."""
    out_TND = torch.empty_like(q_TND)
    for span in spans:
        rows = slice(span.first_token, span.first_token + span.num_new)
        k_MLD, v_MLD = _context(k_cache_MSD, span.runs), _context(v_cache_MSD, span.runs)
        if span.num_new == 1:
            # The query heads that share a KV head become rows of one product with it: no mask, and
            # no copies of the keys.
            q_MGD = q_TND[rows].view(k_MLD.shape[0], -1, q_TND.shape[-1])
            out = scaled_dot_product_attention(q_MGD[None], k_MLD[None], v_MLD[None])
            out_TND[rows] = out.view(1, *q_TND.shape[1:])
        else:
            # New tokens see no padded key: it comes after all of them.
            out = scaled_dot_product_attention(
                _padded(q_TND[rows].transpose(0, 1))[None],
                _padded(k_MLD)[None],
                _padded(v_MLD)[None],
                attn_mask=span.mask,
                is_causal=span.mask is None,
                enable_gqa=True,
            )
            out_TND[rows] = out[0, :, : span.num_new].transpose(0, 1)
    return out_TND.flatten(1)


def write_kv(cache_MSD: torch.Tensor, slots_T: torch.Tensor, values_TMD: torch.Tensor) -> None:
    """Write the keys or values of each new token into its slot (int64)."""
    cache_MSD.index_copy_(1, slots_T, values_TMD.transpose(0, 1))


def _context(cache_MSD: torch.Tensor, runs: Sequence[tuple[int, int]]) -> torch.Tensor:
    views = [cache_MSD.narrow(1, first, length) for first, length in runs]
    return views[0] if len(views) == 1 else torch.cat(views, dim=1)


def _padded(x_NTD: torch.Tensor) -> torch.Tensor:
    return pad(x_NTD, (0, 0, 0, _padding(x_NTD.shape[1])))


def _padding(num: int) -> int:
    return -num % _TILE
