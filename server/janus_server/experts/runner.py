"""Compute an expert worker's share of an MoE layer."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from janus_kernels.activation_schedule import ActivationSchedule, activation_schedule
from janus_kernels.grouped_gemm import expert_ffn
from janus_kernels.linear import linear
from janus_kernels.replica_table import Policy
from janus_kernels.router_topk import router_topk
from janus_kernels.schedule_counts import zero_counts
from janus_scheduler.activation import Scheduling
from janus_scheduler.model_spec import ModelSpec
from janus_server.experts.weights import ExpertLayerWeights

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCounts:
    """What a layer has computed since the start, over all expert workers."""

    num_steps: int
    """Batches."""
    sum_a_max: int
    """Most distinct experts read by one worker, summed over the batches."""
    experts_W: list[int]
    """Distinct experts read by each worker, summed over the batches."""
    tokens_W: list[int]
    """Token-expert pairs of each worker."""
    tokens_E: list[int]
    """Tokens of each logical expert."""


class ExpertRunner:
    """Gate, activation schedule and expert FFN of the slots that worker number `worker` holds.

    Every expert worker sees all tokens of the step and computes the same gate and the same schedule
    from the same input, so that all agree without a message on which worker computes what.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layers: Mapping[int, ExpertLayerWeights],
        *,
        worker: int,
        scheduling: Scheduling,
    ) -> None:
        self._spec = spec
        self._layers = layers
        self._worker = worker
        self._policy = Policy[scheduling.policy.upper()]
        self._costs_ps = (scheduling.costs.expert_ps, scheduling.costs.pair_ps)
        # Summed on the device, so that a step need not wait for it.
        self._sums = {layer: zero_counts(weights.replicas) for layer, weights in layers.items()}
        # Compiled now rather than while the first request waits; one layer is enough for all.
        for layer, weights in list(layers.items())[:1]:
            ids_TK = torch.arange(spec.top_k, device=weights.replicas.slots_ER.device)[None]
            self._schedule(layer, ids_TK)

    def partial(self, layer: int, hidden_TH: torch.Tensor) -> torch.Tensor:
        """Weighted sum of this worker's experts for each token, [T, H] in the dtype of hidden.

        If it fails, the rows are NaN: the attention workers get their answer and end the requests
        of these tokens.
        """
        try:
            return self._partial(layer, hidden_TH)
        except Exception:
            logger.exception("cannot compute the experts of layer %d", layer)
            return torch.full_like(hidden_TH, torch.nan)

    def _partial(self, layer: int, hidden_TH: torch.Tensor) -> torch.Tensor:
        weights = self._layers[layer]
        topk_ids_TK, topk_weights_TK = router_topk(
            linear(hidden_TH, weights.gate_EH),
            self._spec.top_k,
            normalize=self._spec.norm_topk_prob,
        )
        schedule = self._schedule(layer, topk_ids_TK)
        self._sums[layer].add(schedule.counts)
        return expert_ffn(
            hidden_TH,
            schedule.slots_TK,
            topk_weights_TK,
            schedule.counts.tokens_WC[self._worker],
            weights.gate_up_CHF,
            weights.down_CFH,
            first_slot=self._worker * weights.replicas.slots_per_worker,
        ).to(hidden_TH.dtype)

    def _schedule(self, layer: int, topk_ids_TK: torch.Tensor) -> ActivationSchedule:
        table = self._layers[layer].replicas
        return activation_schedule(
            topk_ids_TK, table, self._policy, costs_ps=self._costs_ps, seed=layer
        )

    @property
    def worker(self) -> int:
        """Number of this expert worker."""
        return self._worker

    def counts(self) -> dict[int, LayerCounts]:
        """What each layer has computed so far; waits for the device."""
        return {layer: self._layer_counts(layer) for layer in self._layers}

    def _layer_counts(self, layer: int) -> LayerCounts:
        table = self._layers[layer].replicas
        sums = self._sums[layer].copy_to_cpu()  # steps go on adding
        tokens_S = sums.tokens_WC.flatten()
        slots_ER = table.slots_ER.to("cpu", torch.int64)
        tokens_ER = torch.where(slots_ER >= 0, tokens_S[slots_ER.clamp(min=0)], 0)
        return LayerCounts(
            num_steps=int(sums.num_batches),
            sum_a_max=int(sums.a_max),
            experts_W=sums.experts_W.tolist(),
            tokens_W=sums.tokens_WC.sum(dim=1).tolist(),
            tokens_E=tokens_ER.sum(dim=1).tolist(),
        )
