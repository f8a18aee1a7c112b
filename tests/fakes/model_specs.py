"""Model facts for tests that need no weights."""

from janus_scheduler.model_spec import ModelSpec, RopeSpec

SMALL_SPEC = ModelSpec(
    family="qwen3_moe",
    vocab_size=256,
    hidden_size=8,
    num_layers=3,
    moe_layers=(0, 2),
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    num_experts=5,
    top_k=2,
    norm_topk_prob=True,
    expert_intermediate_size=8,
    dense_intermediate_size=8,
    attention_bias=False,
    tied_embeddings=True,
    rope=RopeSpec(theta=10_000.0),
    rms_norm_eps=1e-6,
    max_context=64,
    eos_token_ids=(0,),
)
