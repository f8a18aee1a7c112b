"""Qwen3-MoE: grouped-query attention with per-head RMSNorm of queries and keys, softmax gate."""

from collections.abc import Mapping
from typing import Any

from janus_scheduler.model_spec import ModelSpec
from janus_server.model.config_json import boolean, integer, integers, number
from janus_server.model.families import Family, TensorNames
from janus_server.model.rope_config import rope_spec
from janus_server.model.unserved_keys import refuse_unserved

MAX_LAYERS = 512
"""Several times what any such model has; with MAX_EXPERTS it bounds the list of tensors."""
MAX_EXPERTS = 1024
"""Of one layer."""
MAX_CONTEXT = 2**20
"""Positions; each has a row in the rotary tables of every attention worker."""


def parse_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Read config.json; raises KeyError or ValueError.

    The sizes of the tensors must be given, but for head_dim, which follows from the others. All
    else that is absent takes the defaults of `transformers.Qwen3MoeConfig`.
    """
    refuse_unserved(config)
    num_layers = integer(config, "num_hidden_layers", high=MAX_LAYERS)
    # The newer spelling wins, as in `transformers`.
    is_new = config.get("num_local_experts") is not None
    spelling = "num_local_experts" if is_new else "num_experts"
    num_experts = integer(config, spelling, high=MAX_EXPERTS)
    top_k = integer(config, "num_experts_per_tok", 8)
    if top_k > num_experts:
        raise ValueError(f"num_experts_per_tok is {top_k}, more than {spelling} {num_experts}")
    num_heads = integer(config, "num_attention_heads")
    num_kv_heads = integer(config, "num_key_value_heads")
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}"
        )
    hidden_size = integer(config, "hidden_size")
    head_dim = integer(config, "head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise ValueError(f"head_dim must be even, not {head_dim}: its halves are rotated as pairs")
    max_context = integer(config, "max_position_embeddings", 32_768, low=2, high=MAX_CONTEXT)
    moe_layers = _moe_layers(config, num_layers)
    return ModelSpec(
        family="qwen3_moe",
        vocab_size=integer(config, "vocab_size"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        moe_layers=moe_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_experts=num_experts,
        top_k=top_k,
        norm_topk_prob=boolean(config, "norm_topk_prob"),
        expert_intermediate_size=integer(config, "moe_intermediate_size"),
        dense_intermediate_size=(
            integer(config, "intermediate_size") if len(moe_layers) < num_layers else 0
        ),
        attention_bias=boolean(config, "attention_bias"),
        tied_embeddings=boolean(config, "tie_word_embeddings"),
        rope=rope_spec(config, head_dim=head_dim, max_context=max_context),
        rms_norm_eps=number(config, "rms_norm_eps", 1e-6, low=0, high=1),
        max_context=max_context,
    )


def _moe_layers(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    sparse_step = integer(config, "decoder_sparse_step", 1)
    dense_only = frozenset(integers(config, "mlp_only_layers"))
    moe_layers = tuple(
        layer
        for layer in range(num_layers)
        if layer not in dense_only and (layer + 1) % sparse_step == 0
    )
    if not moe_layers:
        raise ValueError("mlp_only_layers and decoder_sparse_step leave no layer with experts")
    return moe_layers


FAMILY = Family(
    parse_spec=parse_spec,
    names=TensorNames(
        embedding="model.embed_tokens.weight",
        final_norm="model.norm.weight",
        lm_head="lm_head.weight",
        attention_norm="model.layers.{layer}.input_layernorm.weight",
        ffn_norm="model.layers.{layer}.post_attention_layernorm.weight",
        query="model.layers.{layer}.self_attn.q_proj.weight",
        key="model.layers.{layer}.self_attn.k_proj.weight",
        value="model.layers.{layer}.self_attn.v_proj.weight",
        attention_output="model.layers.{layer}.self_attn.o_proj.weight",
        query_norm="model.layers.{layer}.self_attn.q_norm.weight",
        key_norm="model.layers.{layer}.self_attn.k_norm.weight",
        gate="model.layers.{layer}.mlp.gate.weight",
        expert_gate="model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
        expert_up="model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
        expert_down="model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
        dense_gate="model.layers.{layer}.mlp.gate_proj.weight",
        dense_up="model.layers.{layer}.mlp.up_proj.weight",
        dense_down="model.layers.{layer}.mlp.down_proj.weight",
    ),
)
