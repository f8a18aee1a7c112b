"""README's table of limits says what the code holds."""

from pathlib import Path

from janus_server import grpc_server
from janus_server.endpoint import limits, streams, tokenizer, validation
from janus_server.endpoint.config import AdmissionConfig

README = Path(__file__).parents[3] / "README.md"
DEFAULTS = AdmissionConfig()
PUBLIC = limits.public_limits(DEFAULTS, max_context=1)

ROWS = {
    "prompt and completion": "the context, `--max-context`, or less where the KV cache holds less",
    "a request, in bytes": (
        f"{validation.MAX_TEXT_BYTES_PER_TOKEN} for each token of the context, and "
        f"{limits.MAX_REST_BYTES}; of these {limits.MAX_REST_BYTES} beside the prompt"
    ),
    "a text prompt, in bytes of UTF-8": (
        f"{validation.MAX_TEXT_BYTES_PER_TOKEN} for each token of the context"
    ),
    "`request_id`": f"{validation.MAX_REQUEST_ID_CHARS} letters, digits or `._:/-`",
    "`stop`": (
        f"{validation.MAX_STOP_STRINGS} strings of 1 to {validation.MAX_STOP_CHARS} characters"
    ),
    "`stop_token_ids`": f"{validation.MAX_STOP_TOKEN_IDS}",
    "`logprobs`": f"{validation.MAX_LOGPROBS}",
    "`temperature`": f"0 to {validation.MAX_TEMPERATURE}",
    "fields of a request, unknown ones included": f"{limits.MAX_FIELDS}",
    "metadata of a call, in bytes": f"{grpc_server.MAX_METADATA_BYTES}",
    "requests, running and queued": f"`--max-requests` ({DEFAULTS.max_requests})",
    "calls over one connection": f"`--max-requests` and {limits.SPARE_STREAMS} more",
    "calls of one method": f"`--max-requests` and {limits.SPARE_CALLS} more",
    "connections": f"`--max-requests` and {limits.SPARE_CONNECTIONS} more",
    "a connection without a call": f"{PUBLIC.idle_timeout_s:g} s",
    "until a request has come whole": f"{PUBLIC.request_timeout_s:g} s",
    "until a text has its token ids": f"{tokenizer.ENCODE_TIMEOUT_S:g} s",
    "characters of all texts that wait for token ids": f"{tokenizer.MAX_WAITING_CHARS}",
    "until the client takes a message": (
        f"`--client-stall-timeout-s` ({DEFAULTS.client_stall_timeout_s:g} s)"
    ),
    "tokens that a client may be behind": f"{streams.MAX_PENDING_TOKENS}",
    "tokens of one message": f"{streams.MAX_DELTA_TOKENS}",
}


def test_the_table_says_what_the_code_holds() -> None:
    section = README.read_text().split("\n### Limits\n")[1].split("\n#")[0]
    table = [line for line in section.splitlines() if line.startswith("|")][2:]
    assert table == [f"| {what} | {limit} |" for what, limit in ROWS.items()]
