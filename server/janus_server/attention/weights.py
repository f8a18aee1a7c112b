"""The weights that an attention worker holds: everything but gates and experts."""

from dataclasses import dataclass

import torch

from janus_kernels.linear import pack_weight
from janus_server.model.weights import WeightReader


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseFfnWeights:
    """Feed-forward part of a layer that is no mixture. F intermediate, H hidden. Both packed."""

    gate_up_FH: torch.Tensor
    """[2F, H]: gate rows, then up rows."""
    down_HF: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionLayerWeights:
    """One layer. N query heads, M KV heads, D head dimension, H hidden."""

    attention_norm_H: torch.Tensor
    qkv: torch.Tensor
    """[(N+2M)*D, H], packed: queries, keys, values."""
    qkv_bias: torch.Tensor | None
    qk_norm: torch.Tensor | None
    """[N+M, D]: the norm weight of each query head, then of each key head."""
    output: torch.Tensor
    """[H, N*D], packed."""
    output_bias: torch.Tensor | None
    ffn_norm_H: torch.Tensor
    dense_ffn: DenseFfnWeights | None
    """None: the layer is a mixture of experts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionWeights:
    """All dense weights of a model. V vocabulary, H hidden."""

    embedding_VH: torch.Tensor
    layers: tuple[AttentionLayerWeights, ...]
    final_norm_H: torch.Tensor
    lm_head_VH: torch.Tensor
    """Packed."""


def load_attention_weights(reader: WeightReader) -> AttentionWeights:
    """Read what an attention worker owns, and nothing else."""
    names, spec = reader.checkpoint.family.names, reader.checkpoint.spec
    embedding_VH = reader.read(names.embedding)
    lm_head = embedding_VH if spec.tied_embeddings else reader.read(names.lm_head)
    return AttentionWeights(
        embedding_VH=embedding_VH,
        layers=tuple(_load_layer(reader, layer) for layer in range(spec.num_layers)),
        final_norm_H=reader.read(names.final_norm),
        lm_head_VH=pack_weight(lm_head),
    )


def _load_layer(reader: WeightReader, layer: int) -> AttentionLayerWeights:
    names, spec = reader.checkpoint.family.names, reader.checkpoint.spec

    def named(name: str) -> str:
        return name.format(layer=layer)

    projections = [named(name) for name in (names.query, names.key, names.value)]
    output = named(names.attention_output)
    qk_norm = None
    if names.query_norm is not None and names.key_norm is not None:
        query_norm_D, key_norm_D = (
            reader.read(named(name)) for name in (names.query_norm, names.key_norm)
        )
        qk_norm = torch.cat(
            [query_norm_D.expand(spec.num_heads, -1), key_norm_D.expand(spec.num_kv_heads, -1)]
        )
    dense_ffn = None
    if layer not in spec.moe_layers:
        dense_ffn = DenseFfnWeights(
            gate_up_FH=pack_weight(
                reader.read_rows(named(names.dense_gate), named(names.dense_up))
            ),
            down_HF=pack_weight(reader.read(named(names.dense_down))),
        )
    biased = spec.attention_bias
    return AttentionLayerWeights(
        attention_norm_H=reader.read(named(names.attention_norm)),
        qkv=pack_weight(reader.read_rows(*projections)),
        qkv_bias=reader.read_rows(*map(names.bias, projections)) if biased else None,
        qk_norm=qk_norm,
        output=pack_weight(reader.read(output)),
        output_bias=reader.read(names.bias(output)) if biased else None,
        ffn_norm_H=reader.read(named(names.ffn_norm)),
        dense_ffn=dense_ffn,
    )
