"""A request as the engine sees it: token ids in, sampling rules, progress."""

import enum
from collections.abc import Collection
from dataclasses import dataclass, field

MAX_TEMPERATURE = 100
"""Beyond, every token is as likely as any other."""
MAX_TOP_K = 2**31 - 1
"""More than the vocabulary has is allowed and means all of it, as elsewhere."""
MAX_SEED = 2**63 - 1
"""What an int64 holds."""
MAX_LOGPROBS = 20
"""Most likely tokens reported at each position."""


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Refuse what is not from `low` to `high`, nan included; raises ValueError."""
    if not low <= value <= high:
        # A float32 has fewer digits than Python shows.
        shown = f"{value:.8g}" if isinstance(value, float) else value
        raise ValueError(f"{name} is {shown}; it must be from {low} to {high}")


def check_token_ids(where: str, token_ids: Collection[int], vocab_size: int) -> None:
    """Refuse ids beyond the vocabulary; `where` they stand begins the ValueError's sentence."""
    largest = max(token_ids, default=0)
    if largest >= vocab_size:
        raise ValueError(
            f"{where} has the token id {largest}; the vocabulary ends at {vocab_size - 1}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to stop; raises ValueError where a value is out of bounds."""

    temperature: float = 1.0
    """0: take the most likely token."""
    top_k: int = 0
    """0: all."""
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    max_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    """The model's own end tokens included, unless the request ignores them."""
    num_logprobs: int | None = None
    """None: report no log-probabilities; n: of the chosen token and the n most likely."""

    def __post_init__(self) -> None:
        check_range("temperature", self.temperature, 0, MAX_TEMPERATURE)
        check_range("top_k", self.top_k, 0, MAX_TOP_K)
        check_range("top_p", self.top_p, 0, 1)
        if self.top_p == 0:
            raise ValueError("top_p is 0, which leaves no token; use temperature 0")
        check_range("min_p", self.min_p, 0, 1)
        check_range("seed", self.seed, 0, MAX_SEED)
        check_range("logprobs", self.num_logprobs or 0, 0, MAX_LOGPROBS)
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must be at least 1")


class FinishReason(enum.Enum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(kw_only=True, slots=True)
class Sequence:
    """One running or waiting request. Only the batcher changes it."""

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    output_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    """Tokens, from the first, whose keys and values are in the KV cache."""

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far."""
        return len(self.prompt_ids) + len(self.output_ids)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Token ids at positions `start` to `stop` of prompt plus output."""
        split = len(self.prompt_ids)
        return [
            *self.prompt_ids[start:stop],
            *self.output_ids[max(start - split, 0) : max(stop - split, 0)],
        ]
