"""The facts of a model that policies and processes plan with."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnScaling:
    """Divide slow frequencies, keep fast ones, with a ramp between (Peng et al., 2023)."""

    original_context: int
    """Positions before the context was made longer."""
    beta_fast: float
    """From this many turns over the original context on, a frequency is kept."""
    beta_slow: float
    """Down to this many turns, it is divided."""
    truncate: bool
    """Whether the ramp starts and ends at whole dimensions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3Scaling:
    """Divide long wavelengths, keep short ones, with a ramp between, as Llama 3.1 does."""

    original_context: int
    """Positions before the context was made longer."""
    low_freq_factor: float
    """Wavelengths above original_context divided by this are divided."""
    high_freq_factor: float
    """Wavelengths below original_context divided by this are kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeSpec:
    """How the heads of queries and keys are rotated by their positions."""

    theta: float
    """Base of the frequencies."""
    factor: float = 1.0
    """What frequencies are divided by: all of them, or those that `scaling` says."""
    scaling: YarnScaling | Llama3Scaling | None = None
    attention_factor: float = 1.0
    """What cosines and sines are multiplied by."""


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
    rope: RopeSpec
    rms_norm_eps: float
    max_context: int
    """Positions the model was made for."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a text."""

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that one token keeps in the KV cache, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @property
    def expert_values(self) -> int:
        """Numbers of one expert's weights in one layer."""
        return 3 * self.hidden_size * self.expert_intermediate_size
