"""Parts of tokenizer.json that are not served, whatever the files beside it say."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers

from janus_server.model.config_json import shown

_PREFIX = re.compile(rb'"continuing_subword_prefix"\s*:\s*"[^"]')
_MERGES = re.compile(rb'"merges"\s*:\s*\[')
_RANDOM = ("dropout", "alpha", "nbest_size")
"""Of BPE, and of Unigram."""
_JOINING = ("ByteLevel", "Fuse")
"""Decoders behind which a text is no longer in the pieces of its tokens."""


def refuse_unreadable(tokenizer_json: bytes) -> None:
    """Raise ValueError where the library would not only complain, but end the process."""
    # It cuts the prefix off each merge's second half, whether that begins with it or not.
    if _PREFIX.search(tokenizer_json) and _MERGES.search(tokenizer_json):
        raise ValueError("it has both model.merges and model.continuing_subword_prefix")


def refuse_unserved_parts(tokenizer: tokenizers.Tokenizer) -> None:
    """Raise ValueError where ids are random, or the text of some depends on those that follow."""
    for key in _RANDOM:
        if value := getattr(tokenizer.model, key, None):
            raise ValueError(f"with model.{key} {shown(value)} a text has other ids each time")
    if tokenizer.decoder is None:
        return
    is_joined = False
    for part in _flat(json.loads(tokenizer.decoder.__getstate__())):
        kind = part["type"]
        if (
            kind == "BPEDecoder"
            or (kind == "Strip" and part["stop"])
            or (kind == "Replace" and is_joined)
        ):
            raise ValueError(
                f"its decoder changes the end of a text, {shown(part)}, and texts are streamed"
            )
        is_joined |= kind in _JOINING


def _flat(decoder: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if decoder["type"] == "Sequence":
        for part in decoder["decoders"]:
            yield from _flat(part)
    else:
        yield decoder
