"""Inverse frequencies of the rotary position embedding, in fp32.

Each formula keeps the order of operations of `transformers`, so that even the roundings agree.

Shapes: C half of a head's dimension, one frequency for each pair.
"""

import math

import torch

from janus_scheduler.model_spec import Llama3Scaling, RopeSpec, YarnScaling


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> torch.Tensor:
    """Radians a position, fp32 [C] on the CPU."""
    period_C = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    match rope.scaling:
        case None:
            return 1.0 / period_C / rope.factor
        case YarnScaling() as yarn:
            kept_C = 1 - _yarn_ramp(yarn, rope.theta, head_dim)
            return 1.0 / (rope.factor * period_C) * (1 - kept_C) + 1.0 / period_C * kept_C
        case Llama3Scaling() as llama3:
            return _llama3(llama3, 1.0 / period_C, rope.factor)


def _yarn_ramp(yarn: YarnScaling, theta: float, head_dim: int) -> torch.Tensor:
    """From 0, where a frequency is kept, to 1, where it is divided; fp32 [C]."""

    def pair(turns: float) -> float:
        """The pair that turns so often over the original context."""
        turn = yarn.original_context / (turns * 2 * math.pi)
        return (head_dim * math.log(turn)) / (2 * math.log(theta))

    low, high = pair(yarn.beta_fast), pair(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step, without a division by zero
    ramp_C = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)
    return ramp_C.clamp(0, 1)


def _llama3(llama3: Llama3Scaling, plain_C: torch.Tensor, factor: float) -> torch.Tensor:
    low, high = llama3.low_freq_factor, llama3.high_freq_factor
    context = llama3.original_context
    wavelength_C = 2 * math.pi / plain_C
    is_long_C = wavelength_C > context / low
    is_short_C = wavelength_C < context / high
    scaled_C = torch.where(is_long_C, plain_C / factor, plain_C)
    smooth_C = (context / wavelength_C - low) / (high - low)
    between_C = (1 - smooth_C) * scaled_C / factor + smooth_C * scaled_C
    return torch.where(is_long_C | is_short_C, scaled_C, between_C)
