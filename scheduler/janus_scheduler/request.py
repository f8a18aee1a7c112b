"""A request as the engine sees it: token ids in, sampling rules, progress."""

import enum
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to stop; values are already within bounds."""

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
