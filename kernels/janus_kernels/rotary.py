"""Rotary position embedding (Su et al., 2021), the two halves of a head rotated as pairs.

Shapes: T tokens, N heads, D head dimension (even), C half of it, P positions.
"""

import torch


def rotary_tables(
    inverse_frequencies_C: torch.Tensor,
    *,
    factor: float = 1.0,
    max_context: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [P, D] of every position, times `factor`.

    `inverse_frequencies_C` is fp32, in radians a position; so are the tables, until they are
    rounded to `dtype`.
    """
    position = torch.arange(max_context, dtype=torch.float32, device=inverse_frequencies_C.device)
    angle = torch.outer(position, inverse_frequencies_C).repeat(1, 2)
    return (angle.cos() * factor).to(dtype), (angle.sin() * factor).to(dtype)


def apply_rotary(x_TND: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
    """Rotate each head of each token by the angles of its position."""
    # In place on halves of the result: concatenating rotated halves would copy once more.
    half = x_TND.shape[-1] // 2
    low_TNC, high_TNC = x_TND.split(half, dim=-1)
    sin_T1D = sin_TD.unsqueeze(1)
    out_TND = x_TND * cos_TD.unsqueeze(1)
    out_TND[..., :half].addcmul_(high_TNC, sin_T1D[..., :half], value=-1)
    out_TND[..., half:].addcmul_(low_TNC, sin_T1D[..., half:])
    return out_TND
