"""RMSNorm (Zhang and Sennrich, 2019), computed in fp32 and rounded before the weight is applied."""

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    x [..., D], result alike; weight [D] or anything that broadcasts against x, such as [heads, D].
    Rounding follows the published checkpoints' reference code: the normalised value goes to x's
    dtype first, then it is multiplied.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    return (wide * scale).to(x.dtype) * weight
