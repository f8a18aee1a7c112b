"""Linear projections whose weight is packed once for the device that reads it.

Shapes: x_TI [tokens, in], weight_OI [out, in], result [tokens, out], all of one dtype.

On a CPU, oneDNN otherwise reorders the weight into its blocked layout on every call, which costs as
much as the product itself when few tokens share it (1.3 to 2 times slower, measured on AVX-512).
"""

import torch

_PACKABLE = (torch.float32, torch.bfloat16)


def pack_weight(weight_OI: torch.Tensor) -> torch.Tensor:
    """Return the weight in the layout that `linear` reads fastest, opaque to other ops."""
    if weight_OI.is_cpu and weight_OI.dtype in _PACKABLE and torch.backends.mkldnn.is_available():
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous())
        return packed
    return weight_OI.contiguous()


def linear(
    x_TI: torch.Tensor, weight: torch.Tensor, bias_O: torch.Tensor | None = None
) -> torch.Tensor:
    """x_TI @ weight.T + bias, with a weight from `pack_weight`."""
    if not weight.is_mkldnn:
        return torch.nn.functional.linear(x_TI, weight, bias_O)
    # torch registers this op for its compiler; no public function takes a packed weight.
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, weight, bias_O, "none", [], "")
    return result
