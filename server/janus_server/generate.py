"""`janus generate`: a streaming client of a running endpoint."""

import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import grpc
import tyro

from janus_proto.v1 import inference_pb2
from janus_proto.v1.inference_pb2_grpc import InferenceServiceStub
from janus_scheduler.request import MAX_LOGPROBS, MAX_SEED, MAX_TEMPERATURE
from janus_server.addresses import split_address
from janus_server.bounds import Between, Seconds
from janus_server.command_line import parse
from janus_server.errors import ConfigError, InvalidRequestError, UnavailableError
from janus_server.grpc_server import MAX_MESSAGE_BYTES, channel_options

_IDS = re.compile(r"\s*-?[0-9]{1,20}\s*(,\s*-?[0-9]{1,20}\s*)*")
_LOST = re.compile("stream removed|socket closed|connection reset|goaway|ping timeout")
_NOT_THERE = re.compile("failed to connect|resol")
"""Words of gRPC itself, as against those of the endpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """Generate text from a prompt on a running Janus endpoint.

    Streams the text to standard output; with --json prints one JSON object at the end instead:
    text, token_ids, finish_reason, usage, and logprobs if asked for.
    """

    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")] = ""
    """Text to continue; - reads it from standard input."""

    endpoint: str = "127.0.0.1:50051"
    """HOST:PORT that `janus serve` printed."""

    prompt_ids: str = ""
    """Token ids to continue instead of a text: 12,7,99."""

    max_tokens: Annotated[int, Between(1, 2**31 - 1)] = 128
    """Tokens to generate at most."""

    temperature: Annotated[float, Between(0, MAX_TEMPERATURE)] = 1.0
    """0 takes the most likely token each time; higher is more random."""

    top_k: Annotated[int, Between(0, 2**31 - 1)] = 0
    """Choose among the k most likely tokens; 0: all."""

    top_p: Annotated[float, Between(0, 1)] = 1.0
    """Choose among the most likely tokens that together reach this probability."""

    min_p: Annotated[float, Between(0, 1)] = 0.0
    """Leave out tokens less likely than min_p times the most likely token."""

    seed: Annotated[int | None, Between(0, MAX_SEED)] = None
    """The same seed draws the same random numbers; none: chosen for each request."""

    stop: tuple[str, ...] = ()
    """End before the first of these strings."""

    stop_token_ids: Annotated[tuple[int, ...], Between(0, 2**32 - 1)] = ()
    """End after the first of these token ids."""

    ignore_eos: bool = False
    """Go on past the model's own end of text."""

    logprobs: Annotated[int | None, Between(0, MAX_LOGPROBS)] = None
    """With --json: log-probabilities of each token and of this many most likely tokens."""

    timeout_s: Seconds = 600.0
    """Longest wait for the whole answer, in seconds."""

    json: bool = False
    """Print one JSON object instead of streaming text."""


def command(argv: Sequence[str]) -> int:
    """Generate text on a running server, streamed as it comes."""
    config = parse(GenerateConfig, argv, prog="janus generate")
    split_address(config.endpoint)
    request = _request(config)
    with grpc.insecure_channel(config.endpoint, options=channel_options()) as channel:
        call = InferenceServiceStub(channel).Generate(request, timeout=config.timeout_s)
        try:
            if config.json:
                print(json.dumps(_collect(_whole(call))))
            else:
                for response in _whole(call):
                    print(response.text, end="", flush=True)
                print()
        except grpc.RpcError as error:
            raise _sentence(error, config) from None
        finally:
            call.cancel()  # so that the server does not go on after Ctrl-C
    return 0


def _request(config: GenerateConfig) -> inference_pb2.GenerateRequest:
    if bool(config.prompt) == bool(config.prompt_ids):
        raise ConfigError("give either a PROMPT or --prompt-ids")
    try:
        request = _message(config)
    except ValueError as error:
        # From protobuf: a number beyond its field, or a text that is not Unicode.
        raise ConfigError(f"the request cannot be sent: {error}") from None
    if request.ByteSize() > MAX_MESSAGE_BYTES:
        raise ConfigError(
            f"the request has {request.ByteSize()} bytes; up to {MAX_MESSAGE_BYTES} can be sent"
        )
    return request


def _message(config: GenerateConfig) -> inference_pb2.GenerateRequest:
    sampling = inference_pb2.SamplingParams(
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        max_tokens=config.max_tokens,
        stop=config.stop,
        stop_token_ids=config.stop_token_ids,
        ignore_eos=config.ignore_eos,
    )
    if config.seed is not None:
        sampling.seed = config.seed
    if config.logprobs is not None:
        sampling.logprobs = config.logprobs
    request = inference_pb2.GenerateRequest(sampling=sampling)
    if config.prompt:
        # Standard input may have no end.
        is_piped = config.prompt == "-"
        request.text = sys.stdin.read(MAX_MESSAGE_BYTES + 1) if is_piped else config.prompt
    else:
        request.token_ids.ids.extend(_parse_ids(config.prompt_ids))
    return request


def _parse_ids(text: str) -> list[int]:
    if not _IDS.fullmatch(text):  # int() reads 12_7 as well
        raise ConfigError(
            f"--prompt-ids must be whole numbers with commas between, like 12,7,99, not {text!r}"
        )
    return [int(token_id) for token_id in text.split(",")]


def _whole(
    call: Iterable[inference_pb2.GenerateResponse],
) -> Iterator[inference_pb2.GenerateResponse]:
    """The messages of a stream; raises UnavailableError where the last gives no reason to end."""
    reason = inference_pb2.FINISH_REASON_UNSPECIFIED
    for response in call:
        reason = response.finish_reason
        yield response
    if reason == inference_pb2.FINISH_REASON_UNSPECIFIED:
        raise UnavailableError("the stream ended without a reason: the answer may not be whole")


def _collect(call: Iterable[inference_pb2.GenerateResponse]) -> dict[str, Any]:
    """Gather a whole stream into what --json prints."""
    text = ""
    token_ids: list[int] = []
    logprobs: list[dict[str, Any]] = []
    last = inference_pb2.GenerateResponse()
    for response in call:
        text += response.text
        token_ids += response.token_ids
        logprobs += [
            {
                "logprob": token.logprob,
                "top": dict(zip(token.top_ids, token.top_logprobs, strict=True)),
            }
            for token in response.logprobs
        ]
        last = response
    reason = inference_pb2.FinishReason.Name(last.finish_reason)
    answer: dict[str, Any] = {
        "text": text,
        "token_ids": token_ids,
        "finish_reason": reason.removeprefix("FINISH_REASON_").lower(),
        "usage": {
            "prompt_tokens": last.usage.prompt_tokens,
            "completion_tokens": last.usage.completion_tokens,
        },
    }
    if logprobs:
        answer["logprobs"] = logprobs
    return answer


def _sentence(error: grpc.RpcError, config: GenerateConfig) -> Exception:
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return InvalidRequestError(details)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return UnavailableError(f"no whole answer within {config.timeout_s:g} s")
    # gRPC itself says so if nothing listens there, or the name has no address.
    if code is grpc.StatusCode.UNAVAILABLE and _NOT_THERE.search(details.lower()):
        return UnavailableError(f"no Janus endpoint answers at {config.endpoint}")
    if code is grpc.StatusCode.UNAVAILABLE and _LOST.search(details.lower()):
        return UnavailableError(f"the connection to {config.endpoint} was lost: {details}")
    return UnavailableError(details or f"the call ended with {code.name}")
