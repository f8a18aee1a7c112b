"""Every bound of a request, in one place, so that all front ends hold the same ones.

Those that an attention worker checks as well are in `janus_scheduler.request`.

Each check raises InvalidRequestError with one sentence that names the field, its value and the
bound. No check trusts what a client says of sizes.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from janus_proto.v1 import inference_pb2
from janus_scheduler.request import (
    MAX_LOGPROBS,
    MAX_SEED,
    MAX_TEMPERATURE,
    MAX_TOP_K,
    check_range,
    check_token_ids,
)
from janus_server.errors import InvalidRequestError

MAX_STOP_STRINGS = 16
"""Each is searched for in every delta."""
MAX_STOP_CHARS = 256
"""Characters of one stop string; text this long is held back while it may be matched."""
MAX_STOP_TOKEN_IDS = 64
"""Beside the model's own end tokens."""
MAX_REQUEST_ID_CHARS = 128
"""Characters of a request id."""
MAX_TEXT_BYTES_PER_TOKEN = 16
"""A text longer than this times the context is refused before it is tokenized; prose has 4."""

_REQUEST_ID = re.compile(r"[\w.:/-]+", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """What bounds a request on this endpoint, beside the constants above."""

    vocab_size: int
    max_context: int
    """Prompt plus completion, in tokens."""
    eos_token_ids: tuple[int, ...]
    has_tokenizer: bool


def check_request_id(request_id: str) -> None:
    """Refuse ids that are long or would garble a log."""
    if len(request_id) > MAX_REQUEST_ID_CHARS or not _REQUEST_ID.fullmatch(request_id):
        raise InvalidRequestError(
            f"request_id {request_id[:MAX_REQUEST_ID_CHARS]!a} of {len(request_id)} characters "
            f"must be 1 to {MAX_REQUEST_ID_CHARS} letters, digits or ._:/-"
        )


def check_text(text: str, bounds: Bounds) -> None:
    """Refuse a prompt that cannot be tokenized, or is certainly too long to fit the context."""
    if not bounds.has_tokenizer:
        raise InvalidRequestError("this model has no tokenizer.json: send token ids, not text")
    num_bytes = len(text.encode())
    if num_bytes > MAX_TEXT_BYTES_PER_TOKEN * bounds.max_context:
        raise InvalidRequestError(
            f"the prompt has {num_bytes} bytes of UTF-8; a context of {bounds.max_context} tokens "
            f"allows up to {MAX_TEXT_BYTES_PER_TOKEN * bounds.max_context}"
        )


def check_prompt(prompt_ids: Sequence[int], bounds: Bounds) -> None:
    """Refuse a prompt of a length that cannot be served, and unknown token ids."""
    check_prompt_length(len(prompt_ids), bounds)
    _check_token_ids("the prompt", prompt_ids, bounds)


def check_prompt_length(num_tokens: int, bounds: Bounds) -> None:
    """Refuse an empty prompt, and one without room for a completion."""
    if num_tokens == 0:
        raise InvalidRequestError("the prompt is empty: it needs at least one token")
    if num_tokens >= bounds.max_context:
        raise InvalidRequestError(
            f"the prompt has {num_tokens} tokens; with at least one token to generate, the "
            f"context holds prompts of up to {bounds.max_context - 1}"
        )


def complete_sampling(
    sampling: inference_pb2.SamplingParams, *, num_prompt_tokens: int, bounds: Bounds, seed: int
) -> inference_pb2.SamplingParams:
    """Fill in the defaults; `seed` where none is set. The model's end tokens join the stop ids.

    An explicit max_tokens beyond what the context has left is refused rather than cut, so that
    nobody takes a short answer for a finished one.
    """
    left = bounds.max_context - num_prompt_tokens
    complete = inference_pb2.SamplingParams(
        temperature=sampling.temperature if sampling.HasField("temperature") else 1.0,
        top_k=sampling.top_k,
        top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
        min_p=sampling.min_p,
        seed=sampling.seed if sampling.HasField("seed") else seed,
        max_tokens=sampling.max_tokens if sampling.HasField("max_tokens") else left,
        stop=sampling.stop,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
    )
    if sampling.HasField("logprobs"):
        complete.logprobs = sampling.logprobs
    if complete.max_tokens > left:
        raise InvalidRequestError(
            f"max_tokens is {complete.max_tokens}, but a prompt of {num_prompt_tokens} tokens "
            f"leaves {left} of the {bounds.max_context} tokens of the context"
        )
    if not complete.ignore_eos:
        complete.stop_token_ids.extend(bounds.eos_token_ids)
    return complete


def check_sampling(sampling: inference_pb2.SamplingParams, bounds: Bounds) -> None:
    """Refuse values out of range; unset fields pass."""
    _check_range("temperature", sampling.temperature, 0, MAX_TEMPERATURE)
    _check_range("top_k", sampling.top_k, 0, MAX_TOP_K)
    _check_range("min_p", sampling.min_p, 0, 1)
    _check_range("seed", sampling.seed, 0, MAX_SEED)
    _check_range("logprobs", sampling.logprobs, 0, min(MAX_LOGPROBS, bounds.vocab_size))
    if sampling.HasField("top_p"):
        _check_range("top_p", sampling.top_p, 0, 1)
        if sampling.top_p == 0.0:
            raise InvalidRequestError("top_p is 0, which leaves no token; use temperature 0")
    if sampling.HasField("max_tokens"):
        _check_range("max_tokens", sampling.max_tokens, 1, bounds.max_context)
    _check_stops(sampling, bounds)


def _check_stops(sampling: inference_pb2.SamplingParams, bounds: Bounds) -> None:
    if sampling.stop and not bounds.has_tokenizer:
        raise InvalidRequestError(
            "this model has no tokenizer.json: use stop_token_ids, not stop strings"
        )
    if len(sampling.stop) > MAX_STOP_STRINGS:
        raise InvalidRequestError(
            f"stop has {len(sampling.stop)} strings; up to {MAX_STOP_STRINGS} are allowed"
        )
    for stop in sampling.stop:
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise InvalidRequestError(
                f"a stop string has {len(stop)} characters; 1 to {MAX_STOP_CHARS} are allowed"
            )
    if len(sampling.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequestError(
            f"stop_token_ids has {len(sampling.stop_token_ids)} ids; up to {MAX_STOP_TOKEN_IDS} "
            "are allowed"
        )
    _check_token_ids("stop_token_ids", sampling.stop_token_ids, bounds)


def _check_range(name: str, value: float, low: float, high: float) -> None:
    with _refused():
        check_range(name, value, low, high)


def _check_token_ids(where: str, ids: Sequence[int], bounds: Bounds) -> None:
    with _refused():
        check_token_ids(where, ids, bounds.vocab_size)


@contextmanager
def _refused() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise InvalidRequestError(str(error)) from None
