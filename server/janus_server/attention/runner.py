"""The forward pass of one step on an attention worker.

Shapes: T tokens of a lane, H hidden, N query heads, M KV heads, D head dimension, V vocabulary,
B sequences that sample.

Lanes are pipelined: a lane's experts work while the next lane's attention runs. One lane makes the
plain order of a decoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from janus_kernels.linear import linear
from janus_kernels.norm import rms_norm
from janus_kernels.paged_attention import (
    SequenceSpan,
    paged_attention,
    sequence_span,
    write_kv,
)
from janus_kernels.rotary import apply_rotary, rotary_tables
from janus_scheduler.batching import SequencePlan, StepPlan
from janus_scheduler.model_spec import ModelSpec
from janus_server.attention.kv_cache import KvCache
from janus_server.attention.step_exchange import StepExchange
from janus_server.attention.weights import AttentionLayerWeights, AttentionWeights, DenseFfnWeights
from janus_server.comm.base import ExpertPool
from janus_server.errors import PeerLostError
from janus_server.model.rope import inverse_frequencies


@dataclass(kw_only=True, slots=True)
class _Lane:
    """One micro-batch on its way through the layers."""

    hidden_TH: torch.Tensor
    cos_TD: torch.Tensor
    sin_TD: torch.Tensor
    slots_T: torch.Tensor
    spans: Sequence[SequenceSpan]
    sampled_rows: list[int]


class AttentionRunner:
    """Runs step plans over the weights and KV cache of one attention worker."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: AttentionWeights,
        kv_cache: KvCache,
        *,
        max_context: int,
    ) -> None:
        self._spec = spec
        self._weights = weights
        self._kv_cache = kv_cache
        self._device = weights.embedding_VH.device
        self.progress = 0
        """Grows with every layer and lane that is computed: it stands still where a step hangs."""
        self._cos_PD, self._sin_PD = rotary_tables(
            inverse_frequencies(spec.rope, spec.head_dim).to(self._device),
            factor=spec.rope.attention_factor,
            max_context=max_context,
            dtype=weights.embedding_VH.dtype,
        )

    @torch.inference_mode()
    def forward(self, plan: StepPlan, pool: ExpertPool) -> torch.Tensor:
        """Logits fp32 [B, V] of the sequences that sample, in the order of the plan.

        Whatever it raises, but for PeerLostError, the experts have been walked through the step.
        """
        exchange = StepExchange(
            pool, moe_layers=self._spec.moe_layers, lane_tokens=plan.lane_tokens
        )
        try:
            lanes = [self._prepare(sequences) for sequences in plan.lanes]
            for layer, weights in enumerate(self._weights.layers):
                for index, lane in enumerate(lanes):
                    self._layer(layer, weights, index, lane, exchange)
                    self.progress += 1
            for index, lane in enumerate(lanes):
                self._settle(index, lane, exchange)
        except PeerLostError:
            raise
        except Exception:
            exchange.walk_to_end(self._spec.hidden_size, self._weights.embedding_VH.dtype)
            raise
        return self._logits(torch.cat([lane.hidden_TH[lane.sampled_rows] for lane in lanes]))

    def _layer(
        self,
        layer: int,
        weights: AttentionLayerWeights,
        index: int,
        lane: _Lane,
        exchange: StepExchange,
    ) -> None:
        """Attention of lane number `index`, then its dense feed-forward part or its dispatch."""
        self._settle(index, lane, exchange)
        lane.hidden_TH = lane.hidden_TH + self._attention(layer, weights, lane)
        normed_TH = rms_norm(lane.hidden_TH, weights.ffn_norm_H, self._spec.rms_norm_eps)
        if weights.dense_ffn is None:
            exchange.dispatch(layer, index, normed_TH)
        else:
            lane.hidden_TH = lane.hidden_TH + _dense_ffn(weights.dense_ffn, normed_TH)

    def _prepare(self, sequences: Sequence[SequencePlan]) -> _Lane:
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        spans: list[SequenceSpan] = []
        sampled_rows: list[int] = []
        for sequence in sequences:
            stop = sequence.start + sequence.num_tokens
            spans.append(
                sequence_span(
                    first_token=len(token_ids),
                    num_new=sequence.num_tokens,
                    runs=self._kv_cache.runs(sequence.block_table, stop),
                    device=self._device,
                )
            )
            token_ids += sequence.token_ids
            positions += range(sequence.start, stop)
            slots += self._kv_cache.slots(sequence.block_table, sequence.start, stop)
            if sequence.samples:
                sampled_rows.append(len(token_ids) - 1)
        positions_T = torch.tensor(positions, device=self._device)
        return _Lane(
            hidden_TH=self._weights.embedding_VH[torch.tensor(token_ids, device=self._device)],
            cos_TD=self._cos_PD[positions_T],
            sin_TD=self._sin_PD[positions_T],
            slots_T=torch.tensor(slots, device=self._device),
            spans=spans,
            sampled_rows=sampled_rows,
        )

    def _settle(self, index: int, lane: _Lane, exchange: StepExchange) -> None:
        """Add the result of the lane's mixture under way, where there is one."""
        mixed_TH = exchange.combine(index)
        if mixed_TH is not None:
            lane.hidden_TH = lane.hidden_TH + mixed_TH.to(self._device, lane.hidden_TH.dtype)

    def _attention(self, layer: int, weights: AttentionLayerWeights, lane: _Lane) -> torch.Tensor:
        spec = self._spec
        normed_TH = rms_norm(lane.hidden_TH, weights.attention_norm_H, spec.rms_norm_eps)
        qkv_TND = linear(normed_TH, weights.qkv, weights.qkv_bias).view(
            normed_TH.shape[0], -1, spec.head_dim
        )
        # Queries and keys are normed and rotated alike, as one row of heads.
        qk_TND = qkv_TND[:, : spec.num_heads + spec.num_kv_heads]
        if weights.qk_norm is not None:
            qk_TND = rms_norm(qk_TND, weights.qk_norm, spec.rms_norm_eps)
        qk_TND = apply_rotary(qk_TND, lane.cos_TD, lane.sin_TD)
        keys, values = self._kv_cache.keys[layer], self._kv_cache.values[layer]
        write_kv(keys, lane.slots_T, qk_TND[:, spec.num_heads :])
        write_kv(values, lane.slots_T, qkv_TND[:, spec.num_heads + spec.num_kv_heads :])
        q_TND = qk_TND[:, : spec.num_heads].contiguous()
        mixed = paged_attention(q_TND, keys, values, lane.spans)
        return linear(mixed, weights.output, weights.output_bias)

    def _logits(self, hidden_BH: torch.Tensor) -> torch.Tensor:
        normed_BH = rms_norm(hidden_BH, self._weights.final_norm_H, self._spec.rms_norm_eps)
        return linear(normed_BH, self._weights.lm_head_VH).float()


def _dense_ffn(weights: DenseFfnWeights, x_TH: torch.Tensor) -> torch.Tensor:
    gate_TF, up_TF = linear(x_TH, weights.gate_up_FH).chunk(2, dim=-1)
    return linear(torch.nn.functional.silu(gate_TF) * up_TF, weights.down_HF)
