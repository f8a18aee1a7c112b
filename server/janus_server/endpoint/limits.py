"""What clients may ask of the endpoint before their requests are parsed.

Parsing a message of empty strings takes 50 ms and 20 MB of memory for each MB. So a request is
looked at first: its prompt alone may be long, and has few parts.
"""

from collections.abc import Iterator

from janus_proto.v1.inference_pb2 import GenerateRequest
from janus_server.endpoint.config import AdmissionConfig
from janus_server.endpoint.validation import (
    MAX_REQUEST_ID_CHARS,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MAX_TEXT_BYTES_PER_TOKEN,
)
from janus_server.errors import InvalidRequestError
from janus_server.grpc_server import ServerLimits

_MAX_CHAR_BYTES = 4
_MAX_ID_BYTES = 6
"""A tag and a uint32."""
_MAX_FRAME_BYTES = 8
"""The tag and the length of a field."""

SPARE_CONNECTIONS = 256
"""Connections beside one for each request."""
SPARE_STREAMS = 1024
"""Calls of one connection beside all requests. Cancelled ones count until they are forgotten."""
SPARE_CALLS = 2048
"""Calls of one method over all connections, beside all requests."""

MAX_FIELDS = 64
"""Fields of a request at its outermost level, known and unknown."""
MAX_REST_BYTES = 2**16
"""Bytes of a request beside its prompt; with room, so that one stop string too many is named."""

assert (
    MAX_STOP_STRINGS * (MAX_STOP_CHARS * _MAX_CHAR_BYTES + _MAX_FRAME_BYTES)
    + MAX_STOP_TOKEN_IDS * _MAX_ID_BYTES
    + MAX_REQUEST_ID_CHARS
    < MAX_REST_BYTES // 3
)

_TEXT = GenerateRequest.DESCRIPTOR.fields_by_name["text"].number
_TOKEN_IDS = GenerateRequest.DESCRIPTOR.fields_by_name["token_ids"].number
_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5


def max_request_bytes(max_context: int) -> int:
    """What a valid request of a model with this context can need; a text needs more than ids."""
    return max_context * MAX_TEXT_BYTES_PER_TOKEN + MAX_REST_BYTES


def public_limits(config: AdmissionConfig, *, max_context: int) -> ServerLimits:
    """What valid requests can need, and some room beside."""
    return ServerLimits(
        max_request_bytes=max_request_bytes(max_context),
        max_connections=config.max_requests + SPARE_CONNECTIONS,
        max_streams=config.max_requests + SPARE_STREAMS,
        max_calls_per_method=config.max_requests + SPARE_CALLS,
        stall_timeout_s=config.client_stall_timeout_s,
        check_bytes=lambda data: check_bytes(data, max_context),
    )


def check_bytes(data: bytes, max_context: int) -> None:
    """Refuse a request with many fields, too many ids, or too much beside its prompt."""
    rest = num_id_bytes = 0
    for count, (number, num_bytes) in enumerate(_fields(data), start=1):
        if count > MAX_FIELDS:
            raise InvalidRequestError(f"the request has more than {MAX_FIELDS} fields")
        if number == _TOKEN_IDS:
            num_id_bytes += num_bytes
        elif number != _TEXT:
            rest += num_bytes
        if num_id_bytes > max_context * _MAX_ID_BYTES + MAX_REST_BYTES:
            raise InvalidRequestError(
                f"the token ids of the prompt have {num_id_bytes} bytes, more than a context of "
                f"{max_context} tokens needs"
            )
        if rest > MAX_REST_BYTES:
            raise InvalidRequestError(
                f"the request has {rest} bytes beside its prompt, more than the {MAX_REST_BYTES} "
                "that are allowed"
            )


def _fields(data: bytes) -> Iterator[tuple[int, int]]:
    """(number, bytes) of each field at the outermost level."""
    at = 0
    while at < len(data):
        start = at
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == _VARINT:
            _, at = _varint(data, at)
        elif kind == _DELIMITED:
            length, at = _varint(data, at)
            at += length
        elif kind == _FIXED64:
            at += 8
        elif kind == _FIXED32:
            at += 4
        else:
            raise _damaged()
        if at > len(data):
            raise _damaged()
        yield tag >> 3, at - start


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, position behind it)."""
    value = 0
    for index, byte in enumerate(data[at : at + 10]):
        value |= (byte & 127) << 7 * index
        if byte < 128:
            return value, at + index + 1
    raise _damaged()


def _damaged() -> InvalidRequestError:
    return InvalidRequestError("the request is no valid message: damaged")
