"""The facts of a model that policies and processes plan with."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """Shapes and constants of one Mixture-of-Experts decoder, whatever its family."""

    family: str
    """`model_type` of the checkpoint's config.json."""
    vocab_size: int
    hidden_size: int
    num_layers: int
    moe_layers: tuple[int, ...]
    """Indices of the layers whose feed-forward part is a mixture of experts, ascending."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    head_dim: int
    num_experts: int
    top_k: int
    """Experts of each token."""
    norm_topk_prob: bool
    """Whether the weights of the chosen experts are scaled to sum to 1."""
    expert_intermediate_size: int
    dense_intermediate_size: int
    """Of the layers outside moe_layers."""
    attention_bias: bool
    tied_embeddings: bool
    """Whether the LM head is the embedding table."""
    rope_theta: float
    rms_norm_eps: float
    max_context: int
    """Positions the model was made for."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a text."""

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that one token keeps in the KV cache, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim
