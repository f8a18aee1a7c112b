"""Read the tokenizer of a model folder so that it cuts text as `transformers` would.

tokenizer.json alone says how. The files beside it may name further tokens, which `transformers`
adds: a folder whose files disagree about that is refused.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from janus_server.errors import CheckpointError
from janus_server.input_file import is_there, read_file
from janus_server.model.config_json import read_object, shown

_MAX_BYTES = 2**28
"""Several times the largest that is known."""
_CONFIG = "tokenizer_config.json"
_NAMING_FILES = (_CONFIG, "special_tokens_map.json", "added_tokens.json")
_SINGLE = tuple(f"{name}_token" for name in ["bos", "eos", "unk", "sep", "pad", "cls", "mask"])
_DECODER = "added_tokens_decoder"
_LISTS = ("additional_special_tokens", "extra_special_tokens", _DECODER)
_FLAGS = frozenset({"lstrip", "rstrip", "single_word", "normalized"})
"""Of an added token; each changes how the text around it is cut."""


def read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer at `path`; raises CheckpointError."""
    content = read_file(path, CheckpointError, max_bytes=_MAX_BYTES)
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # nothing narrower is raised, and a panic is no Exception
        raise CheckpointError(f"{path} is not a usable tokenizer: {error}") from None
    # Settings of the training or of another use; a prompt is neither cut short nor filled up.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    for name in _NAMING_FILES:
        if is_there(path.parent / name):
            config = read_object(path.parent / name)
            for key, token in _tokens_of(name, config):
                _check_token(path.parent / name, key, token, added)
            if name == _CONFIG:
                tokenizer.encode_special_tokens = config.get("split_special_tokens") is True
    return tokenizer


def _tokens_of(name: str, config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(key, token) of all tokens that a file names, each its text or an object with `content`."""
    if name == "added_tokens.json":
        yield from ((name, token) for token in config)
        return
    for key in _SINGLE:
        if config.get(key) is not None:
            yield key, config[key]
    for key in _LISTS:
        tokens = config.get(key) or []
        if isinstance(tokens, dict):
            tokens = list(tokens.values())
        yield from ((key, token) for token in (tokens if isinstance(tokens, list) else [tokens]))


def _check_token(
    path: Path, key: str, token: Any, added: Mapping[str, tokenizers.AddedToken]
) -> None:
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str) or content not in added:
        raise CheckpointError(
            f"{path} names the token {shown(content)}, which is not among the added tokens of "
            "tokenizer.json"
        )
    if key != _DECODER or not isinstance(token, dict):
        return
    # Elsewhere, flags of a token that is there already have no effect.
    for flag in _FLAGS & token.keys():
        if token[flag] != getattr(added[content], flag):
            raise CheckpointError(
                f"{path} and tokenizer.json disagree: {flag} of the token {shown(content)}"
            )
