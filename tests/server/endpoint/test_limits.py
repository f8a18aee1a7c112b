import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from janus_proto.v1.inference_pb2 import GenerateRequest, SamplingParams, TokenIds
from janus_server.endpoint.limits import MAX_FIELDS, MAX_REST_BYTES, check_bytes, max_request_bytes
from janus_server.endpoint.validation import (
    MAX_REQUEST_ID_CHARS,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
)
from janus_server.errors import InvalidRequestError

CONTEXT = 64
LARGEST = {
    "request_id": "r" * MAX_REQUEST_ID_CHARS,
    "sampling": SamplingParams(
        temperature=1,
        top_k=2**31 - 1,
        top_p=1,
        min_p=1,
        seed=2**63 - 1,
        max_tokens=2**31 - 1,
        stop=["\U0001f600" * MAX_STOP_CHARS] * MAX_STOP_STRINGS,
        stop_token_ids=[2**32 - 1] * MAX_STOP_TOKEN_IDS,
        ignore_eos=True,
        logprobs=20,
    ),
}


def field(number: int, content: bytes) -> bytes:
    head = number << 3 | 2
    length = len(content)
    return (
        bytes([head]) + length.to_bytes(1, "big") + content
        if length < 128
        else (bytes([head, length & 127 | 128]) + field_rest(length >> 7) + content)
    )


def field_rest(length: int) -> bytes:
    return (
        bytes([length]) if length < 128 else bytes([length & 127 | 128]) + field_rest(length >> 7)
    )


@pytest.mark.parametrize(
    "prompt",
    [
        {"text": "\U0001f600" * (4 * CONTEXT)},
        {"token_ids": TokenIds(ids=[2**32 - 1] * CONTEXT)},
    ],
    ids=["text", "ids"],
)
def test_the_largest_valid_request_passes(prompt: dict[str, object]) -> None:
    data = GenerateRequest(**LARGEST, **prompt).SerializeToString()  # type: ignore[arg-type]
    assert len(data) <= max_request_bytes(CONTEXT)
    check_bytes(data, CONTEXT)


def test_ids_that_are_not_packed_pass() -> None:
    check_bytes(field(3, b"\x08\xff\xff\xff\xff\x0f" * CONTEXT), CONTEXT)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (field(4, b"\x3a\x00" * 40_000), "80004 bytes beside its prompt, more than the 65536"),
        (field(1, b"x" * MAX_REST_BYTES), "bytes beside its prompt"),
        (field(4, b"\x3a\x00" * 20_000) * 2, "bytes beside its prompt"),
        (field(9, b"x" * MAX_REST_BYTES), "bytes beside its prompt"),
        (field(3, b"\x08\x01" * 40_000), "the token ids of the prompt have 80004 bytes"),
        (field(2, b"") * (MAX_FIELDS + 1), "more than 64 fields"),
        (b"\x50\x01" * (MAX_FIELDS + 1), "more than 64 fields"),
        (b"\x53" * 100_000, "no valid message"),
        (field(4, b"x" * 100)[:-1], "no valid message"),
        (field(4, b"x" * MAX_REST_BYTES)[:20], "no valid message"),
        (field(3, b"x" * 4 * MAX_REST_BYTES)[:20], "no valid message"),
        (b"\x50" + b"\xff" * 11, "no valid message"),
        (b"\x50", "no valid message"),
    ],
)
def test_what_would_take_long_to_parse_is_refused(data: bytes, sentence: str) -> None:
    with pytest.raises(InvalidRequestError, match=sentence):
        check_bytes(data, CONTEXT)


@given(st.binary(max_size=200))
def test_any_bytes_pass_or_are_refused(data: bytes) -> None:
    with contextlib.suppress(InvalidRequestError):
        check_bytes(data, CONTEXT)


@given(
    st.builds(
        GenerateRequest,
        request_id=st.text(max_size=20),
        text=st.text(max_size=50),
        sampling=st.builds(
            SamplingParams,
            temperature=st.floats(width=32),
            stop=st.lists(st.text(max_size=20), max_size=5),
        ),
    )
)
def test_messages_pass(request: GenerateRequest) -> None:
    check_bytes(request.SerializeToString(), CONTEXT)
