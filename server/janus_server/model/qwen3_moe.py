"""Qwen3-MoE: grouped-query attention with per-head RMSNorm of queries and keys, softmax gate."""

from collections.abc import Mapping
from typing import Any

from janus_scheduler.model_spec import ModelSpec
from janus_server.model.families import Family, TensorNames


def parse_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Read config.json; absent keys take the defaults of `transformers.Qwen3MoeConfig`."""
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {config['hidden_act']!r} is not served, only 'silu'")
    if config.get("use_sliding_window", False):
        raise ValueError("use_sliding_window is not served")
    num_layers = _positive(config, "num_hidden_layers")
    num_experts = _positive(config, "num_experts", config.get("num_local_experts"))
    top_k = _positive(config, "num_experts_per_tok")
    if top_k > num_experts:
        raise ValueError(f"num_experts_per_tok is {top_k}, more than num_experts {num_experts}")
    num_heads = _positive(config, "num_attention_heads")
    num_kv_heads = _positive(config, "num_key_value_heads")
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}"
        )
    hidden_size = _positive(config, "hidden_size")
    sparse_step = int(config.get("decoder_sparse_step", 1))
    dense_only = config.get("mlp_only_layers") or []
    return ModelSpec(
        family="qwen3_moe",
        vocab_size=_positive(config, "vocab_size"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        moe_layers=tuple(
            layer
            for layer in range(num_layers)
            if layer not in dense_only and sparse_step > 0 and (layer + 1) % sparse_step == 0
        ),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=int(config.get("head_dim") or hidden_size // num_heads),
        num_experts=num_experts,
        top_k=top_k,
        norm_topk_prob=bool(config.get("norm_topk_prob", False)),
        expert_intermediate_size=_positive(config, "moe_intermediate_size"),
        dense_intermediate_size=int(config.get("intermediate_size", 0)),
        attention_bias=bool(config.get("attention_bias", False)),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        rope_theta=_rope_theta(config),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        max_context=_positive(config, "max_position_embeddings"),
    )


def _positive(config: Mapping[str, Any], key: str, fallback: Any = None) -> int:
    value = config.get(key, fallback)
    if value is None:
        raise KeyError(key)
    if not isinstance(value, int) or value <= 0:
        raise ValueError(f"{key} must be a positive integer, not {value!r}")
    return value


def _rope_theta(config: Mapping[str, Any]) -> float:
    # Newer configs keep all of it in rope_parameters, older ones beside the rest.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope type {kind!r} is not served, only 'default'")
    return float(rope.get("rope_theta", config.get("rope_theta", 10_000.0)))


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
