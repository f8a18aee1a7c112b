"""Linear projections whose weight is packed once for the device that reads it.

Shapes: x_TI [tokens, in], weight_OI [out, in], result [tokens, out], all of one dtype.

On a CPU, oneDNN otherwise reorders the weight into its blocked layout on every call, which costs as
much as the product itself when few tokens share it (1.3 to 2 times slower, measured on AVX-512).

Also there, rows are padded to one of few numbers. Torch and oneDNN each keep the compiled products
of the last 1024 shapes, about 0.5 MiB a shape: under requests of mixed lengths an expert worker of
a 12 MiB model grew by 700 MiB, and spent a third of its time on compiling them.
"""

import torch

_PACKABLE = (torch.float32, torch.bfloat16)

_PADDED_SIZES = 16
"""Numbers of rows between a power of two and the next: at most a 16th of the rows is padding."""


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
    num_tokens = x_TI.shape[0]
    padding = padded_size(num_tokens) - num_tokens
    if padding:
        x_TI = torch.nn.functional.pad(x_TI, (0, 0, 0, padding))
    # torch registers this op for its compiler; no public function takes a packed weight.
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, weight, bias_O, "none", [], "")
    return result[:num_tokens] if padding else result


def padded_size(num_rows: int) -> int:
    """The number of rows that are computed for so many: exact up to 32, coarser above.

    Example: 33 and 34 become 34, 65 to 68 become 68, 1000 becomes 1024.
    """
    if num_rows <= 2 * _PADDED_SIZES:
        return num_rows
    below = 1 << (num_rows - 1).bit_length() - 1
    step = below // _PADDED_SIZES
    return -(-num_rows // step) * step
