"""Compute one expert worker's share of an MoE layer."""

import torch

from janus_kernels.activation_schedule import first_replica
from janus_kernels.grouped_gemm import expert_ffn
from janus_kernels.linear import linear
from janus_kernels.router_topk import router_topk
from janus_scheduler.model_spec import ModelSpec
from janus_server.experts.weights import LayerWeights


class ExpertRunner:
    """Gate, replica choice and expert FFN of the slots that this worker holds.

    Every expert worker sees all tokens of the step and computes the same gate from the same input,
    so that all agree on who computes what without a message.
    """

    def __init__(self, spec: ModelSpec, layers: dict[int, LayerWeights]) -> None:
        self._spec = spec
        self._layers = layers
        self.num_layer_steps = 0
        """MoE layers computed since the start."""
        self.num_activated_experts = 0
        """Expert slots that received tokens, summed over those layers."""
        self.num_token_pairs = 0
        """Token-expert pairs computed."""

    def partial(self, layer: int, hidden_TH: torch.Tensor) -> torch.Tensor:
        """Weighted sum of this worker's experts for each token, [T, H] in the dtype of hidden."""
        weights = self._layers[layer]
        topk_ids_TK, topk_weights_TK = router_topk(
            linear(hidden_TH, weights.gate_EH),
            self._spec.top_k,
            normalize=self._spec.norm_topk_prob,
        )
        slots_TK = first_replica(topk_ids_TK, weights.first_slot_E)
        partial_TH, tokens_C = expert_ffn(
            hidden_TH, slots_TK, topk_weights_TK, weights.gate_up_CHF, weights.down_CFH
        )
        self.num_layer_steps += 1
        self.num_activated_experts += int((tokens_C > 0).sum())
        self.num_token_pairs += int(tokens_C.sum())
        return partial_TH.to(hidden_TH.dtype)
