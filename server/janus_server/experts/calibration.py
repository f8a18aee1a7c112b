"""Measure what the `auto` schedule weighs: the time to read an expert, and to compute a pair.

An expert FFN takes a constant time, a time for each activated expert (beta) and a time for each
token-expert pair (gamma): three unknowns, hence three probes. Every repetition uses other weights,
because in a model the layers push each other's weights out of the caches.
"""

import statistics
import time
from collections.abc import Callable

import torch

from janus_kernels.grouped_gemm import expert_ffn
from janus_kernels.linear import pack_weight
from janus_scheduler.activation import MAX_COST_PS, ActivationCosts
from janus_scheduler.model_spec import ModelSpec

_MAX_EXPERTS = 8
"""Experts of the largest probe of reading."""
_MAX_BYTES = 512 * 2**20
"""Limit of a set of made-up weights: it has fewer experts if they are large."""
_CACHE_BYTES = 64 * 2**20
"""Weights to read before the same ones are read again, so that no cache holds them any more."""
_MAX_SETS = 16
"""Sets of weights, at most."""
_PROBE_FLOP = 2e9
"""Floating-point operations of the largest probe: a fraction of a second on a core."""
_MIN_TOKENS, _MAX_TOKENS = 16, 128
_REPEATS = 7
"""Timings of a probe, of which the median counts."""


def measure_costs(
    spec: ModelSpec,
    *,
    dtype: torch.dtype,
    device: torch.device,
    ffn: Callable[..., torch.Tensor] = expert_ffn,
    clock: Callable[[], float] = time.perf_counter,
) -> ActivationCosts:
    """Time probes of this model's experts on this worker; takes up to a second or two."""
    hidden, inner = spec.hidden_size, spec.expert_intermediate_size
    expert_bytes = 3 * hidden * inner * dtype.itemsize
    num_experts = max(2, min(_MAX_EXPERTS, _MAX_BYTES // expert_bytes))
    num_sets = max(1, min(_MAX_SETS, _CACHE_BYTES // (num_experts * expert_bytes) + 1))
    most_tokens = round(_PROBE_FLOP / (6 * hidden * inner))
    most_tokens = max(_MIN_TOKENS, min(_MAX_TOKENS, most_tokens))
    sets = [
        [
            tuple(
                pack_weight(torch.full(shape, 0.01, dtype=dtype, device=device))
                for _ in range(num_experts)
            )
            for shape in ((2 * inner, hidden), (hidden, inner))
        ]
        for _ in range(num_sets)
    ]

    def probe(active: int, tokens: int) -> float:
        """Seconds of one FFN with `tokens` tokens on each of `active` experts."""
        hidden_TH = torch.randn(active * tokens, hidden, device=device).to(dtype)
        slots_TK = torch.arange(active, device=device).repeat_interleave(tokens).unsqueeze(1)
        scale_TK = torch.ones(slots_TK.shape, dtype=dtype, device=device)
        tokens_C = torch.bincount(slots_TK.flatten(), minlength=num_experts)
        times: list[float] = []
        for repeat in range(_REPEATS + 1):
            gate_up, down = sets[repeat % num_sets]
            start = clock()
            ffn(hidden_TH, slots_TK, scale_TK, tokens_C, gate_up, down, first_slot=0)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(clock() - start)
        return statistics.median(times[1:])  # the first call may compile or allocate

    with torch.inference_mode():
        least, experts, tokens = probe(1, 1), probe(num_experts, 1), probe(1, most_tokens)
    pair_s = (tokens - least) / (most_tokens - 1)
    # Each further expert of that probe comes with a pair of its own.
    expert_s = (experts - least) / (num_experts - 1) - pair_s
    return ActivationCosts(expert_ps=_cost_ps(expert_s), pair_ps=_cost_ps(pair_s))


def _cost_ps(measured_s: float) -> int:
    return min(max(1, round(1e12 * measured_s)), MAX_COST_PS)
