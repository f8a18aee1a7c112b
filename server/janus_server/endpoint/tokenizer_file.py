"""Read the tokenizer of a model folder so that it cuts text as `transformers` would.

tokenizer.json alone says how. The files beside it may name further tokens, which `transformers`
adds, or have it use less of tokenizer.json: a folder whose files disagree is refused. Where there
is nothing beside it, `transformers` 5 may still use less; that is logged, and tokenizer.json holds.
"""

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, models

from janus_server.endpoint.tokenizer_class import check_rebuilt, is_rebuilt
from janus_server.endpoint.tokenizer_parts import refuse_unreadable, refuse_unserved_parts
from janus_server.errors import CheckpointError
from janus_server.input_file import is_there, read_file
from janus_server.model.checkpoint import Checkpoint
from janus_server.model.config_json import boolean, read_object, shown, table

logger = logging.getLogger(__name__)

_MAX_BYTES = 2**28
"""Several times the largest that is known."""
_SINGLE = tuple(f"{name}_token" for name in ["bos", "eos", "unk", "sep", "pad", "cls", "mask"])
_LISTS = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")
_DECODER = "added_tokens_decoder"
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
"""Of an added token; each changes how the text around it is cut, or whether it is shown."""
_NOT_SERVED = ("fast_tokenizer_files", "tokenizer_padding", "_json_padding")
"""Keys of tokenizer_config.json that name another tokenizer.json or bring in a further token."""
_SWITCHES = ("add_bos_token", "add_eos_token")
"""Without effect in tokenizer_config.json, where a tokenizer.json has its own."""
_CLEAN_UP = "clean_up_tokenization_spaces"
_CLEAN_UP_BPE = f"{_CLEAN_UP}_for_bpe_even_though_it_will_corrupt_output"

_Added = Mapping[str, tuple[int, AddedToken]]
"""The added tokens of tokenizer.json by their text, with their ids."""


def checked_tokenizer(checkpoint: Checkpoint) -> tokenizers.Tokenizer | None:
    """The tokenizer of a model folder; None where it has none.

    Takes under a second with the largest vocabularies. Raises CheckpointError where it is unusable,
    or that of another model.
    """
    path = checkpoint.path / "tokenizer.json"
    if not is_there(path):
        return None
    tokenizer = read_tokenizer(path)
    # Added tokens, such as one for padding, may go beyond: a prompt with one is refused.
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    largest, size = max(vocabulary.values(), default=0), checkpoint.spec.vocab_size
    if largest >= size:
        raise CheckpointError(
            f"{path} is of another model: it makes token ids up to {largest}, and the model has a "
            f"vocabulary of {size}"
        )
    return tokenizer


def read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer at `path`; raises CheckpointError."""
    content = read_file(path, CheckpointError, max_bytes=_MAX_BYTES)
    with _refusing(path):
        refuse_unreadable(content)
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # nothing narrower is raised, and a panic is no Exception
        raise CheckpointError(f"{path} is not a usable tokenizer: {error}") from None
    _check_folder(path, content, tokenizer)
    # Settings of the training or of another use; a prompt is neither cut short nor filled up.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _check_folder(path: Path, tokenizer_json: bytes, tokenizer: tokenizers.Tokenizer) -> None:
    """Refuse what makes `transformers` use anything but `tokenizer`, made of `tokenizer_json`."""
    names = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    paths = [path.parent / name for name in names]
    model_config, config, special, ids = (
        read_object(each) if is_there(each) else {} for each in paths
    )
    tokens = tokenizer.get_added_tokens_decoder()
    added = {token.content: (index, token) for index, token in tokens.items()}
    with _refusing(path):
        refuse_unserved_parts(tokenizer)
        padding = tokenizer.padding
        named = _named({} if padding is None or "pad_token" in config else padding, added)
    with _refusing(paths[1]):
        _refuse_unserved(config, tokenizer.model)
        named += _named(config, added)
        tokenizer.encode_special_tokens = boolean(config, "split_special_tokens")
    with _refusing(paths[2]):
        named += _named(special, added, tokens_alone=True)
    with _refusing(paths[3]):
        for content, index in ids.items():
            _check_same("id", content, index, _find("it", content, added)[0])
    where = "added_tokens" if config.get(_DECODER) is None else _DECODER
    with _refusing(path if config.get(_DECODER) is None else paths[1]):
        listed = _listed(config, tokenizer_json)
        for index, token in listed.items():
            read_index, read = _find(where, token.content, added)
            _check_same("id", token.content, index, read_index)
            for flag in _FLAGS:
                _check_same(flag, token.content, getattr(token, flag), getattr(read, flag))
    with _refusing(paths[0] if config.get("tokenizer_class") is None else paths[1]):
        is_qwen2 = is_rebuilt(config, model_config, tokenizer_json)
    if not is_qwen2:
        return
    # Where there is a list of added tokens, special_tokens_map.json has no effect.
    keys = config if _DECODER in config else {**special, **config}
    with _refusing(path):
        try:
            check_rebuilt(tokenizer, listed, named, keys)
        except ValueError as error:
            # Whoever saves tokenizer.json alone means it as it is.
            if is_there(paths[1]) or model_config.get("tokenizer_class") is not None:
                raise
            logger.warning(
                "%s is served as it is, without a tokenizer_config.json: %s", path, error
            )


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{path} is not served: {error}") from None


def _refuse_unserved(config: Mapping[str, Any], model: models.Model) -> None:
    """Raise ValueError where tokenizer_config.json has keys that need more than is done here."""
    code = config.get("auto_map")
    if isinstance(code, dict):
        code = code.get("AutoTokenizer")
    if code is not None:
        raise ValueError(f"its auto_map names code of its own, {shown(code)}")
    for key in _NOT_SERVED:
        if config.get(key):
            raise ValueError(f"it has {key} {shown(config[key])}")
    is_bpe = isinstance(model, models.BPE)
    if config.get(_CLEAN_UP) and (not is_bpe or config.get(_CLEAN_UP_BPE)):
        key = _CLEAN_UP_BPE if is_bpe else _CLEAN_UP
        raise ValueError(f"it has {key} {shown(config[key])}")


def _named(config: Mapping[str, Any], added: _Added, *, tokens_alone: bool = False) -> list[str]:
    """The texts of all tokens that have a role in `config`; ValueError where it has others.

    Each is the text alone or an object with its `content`. With `tokens_alone`, nothing else may
    be there.
    """
    found: list[str] = []
    for key, value in config.items():
        if key in _LISTS:
            tokens = list(value.values()) if isinstance(value, dict) else value or []
            found += [
                _special(key, token, added)
                for token in (tokens if isinstance(tokens, list) else [tokens])
            ]
        elif key in _SINGLE and value is None:
            continue
        elif key in _SINGLE or (
            key.endswith("_token") and key not in _SWITCHES and isinstance(value, str | dict)
        ):
            found.append(_special(key, value, added))
        elif tokens_alone:
            raise ValueError(f"it has the key {shown(key)}, which names no token")
    return found


def _special(key: str, token: Any, added: _Added) -> str:
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str) or content not in added or not added[content][1].special:
        raise ValueError(
            f"{key} names the token {shown(content)}, which is not among the special added tokens "
            "of tokenizer.json"
        )
    return content


def _find(where: str, content: str, added: _Added) -> tuple[int, AddedToken]:
    if content not in added:
        raise ValueError(
            f"{where} lists the token {shown(content)}, which is not among the added tokens of "
            "tokenizer.json"
        )
    return added[content]


def _listed(config: Mapping[str, Any], tokenizer_json: bytes) -> dict[int, AddedToken]:
    """The added tokens by id: those of tokenizer_config.json, else of tokenizer.json."""
    if config.get(_DECODER) is None:
        tokens = json.loads(tokenizer_json).get("added_tokens") or []
        return {token["id"]: _added_token(token) for token in tokens}
    tokens = table(config, _DECODER)
    for index in tokens:
        if not index.isdecimal():
            raise ValueError(f"{_DECODER} has {shown(index)} for an id")
    return {int(index): _added_token(token) for index, token in tokens.items()}


def _added_token(fields: Any) -> AddedToken:
    if not isinstance(fields, dict) or not isinstance(fields.get("content"), str):
        raise ValueError(f"{_DECODER} has {shown(fields)} for a token")
    flags = {flag: boolean(fields, flag) for flag in _FLAGS if flag in fields}
    return AddedToken(fields["content"], **flags)


def _check_same(key: str, token: str, value: Any, read: Any) -> None:
    if value != read:
        raise ValueError(
            f"its token {shown(token)} has {key} {shown(value)}, and that of tokenizer.json, once "
            f"read, has {shown(read)}"
        )
