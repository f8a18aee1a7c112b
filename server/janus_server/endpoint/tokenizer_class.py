"""Which class of `transformers` makes a tokenizer, and whether it is that of tokenizer.json.

Some classes use tokenizer.json as it is. Others take its vocabulary and merges alone and bring the
rest themselves: one of them is served, where what it brings is what tokenizer.json says.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from janus_server.model.config_json import boolean, shown

_AS_IT_IS = ("TokenizersBackend", "PreTrainedTokenizerFast")
_LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast")
"""Used as it is if it is byte-level."""
_QWEN2 = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
"""The class of the model families that are served: the one where no file names a class."""
_QWEN2_TOKENS = ("unk_token", "eos_token", "pad_token")
_QWEN2_DEFAULT = "<|endoftext|>"
"""Each of those that no file mentions."""
_QWEN2_MODEL: Mapping[str, tuple[object, ...]] = {
    "unk_token": (None,),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "fuse_unk": (False,),
    "byte_fallback": (False,),
    "ignore_merges": (False,),
}
_QWEN2_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def is_rebuilt(config: Mapping[str, Any], model_config: Mapping[str, Any], content: bytes) -> bool:
    """Whether `transformers` makes a Qwen2Tokenizer, and does not use tokenizer.json as it is.

    `config` is tokenizer_config.json, `model_config` config.json and `content` tokenizer.json.
    Raises ValueError, with the key, where it does neither.
    """
    name = config.get("tokenizer_class")
    if name is None:
        name = model_config.get("tokenizer_class")
    if name is None or name in _QWEN2:
        return True
    if name not in _AS_IT_IS and not (name in _LLAMA and b'"ByteLevel"' in content):
        served = ", ".join((*_AS_IT_IS, *_QWEN2))
        raise ValueError(f"its tokenizer_class is {shown(name)}; served are {served}")
    model_name = model_config.get("model_name")
    if isinstance(model_name, str) and "/" not in model_name:
        # One that is also a model_type can make `transformers` ignore tokenizer_class.
        raise ValueError(
            f"with the model_name {shown(model_name)} of config.json, its tokenizer_class "
            f"{shown(name)} may have no effect"
        )
    return False


def check_rebuilt(
    tokenizer: tokenizers.Tokenizer,
    listed: Mapping[int, AddedToken],
    named: Iterable[str],
    config: Mapping[str, Any],
) -> None:
    """Raise ValueError, with the part, unless `tokenizer` is what Qwen2Tokenizer makes of it.

    `listed` are the added tokens by id, and `named` the texts of those that have a role in
    `config`, tokenizer_config.json.
    """
    add_prefix_space = boolean(config, "add_prefix_space")
    defaults = [_QWEN2_DEFAULT for key in _QWEN2_TOKENS if key not in config]
    part = _other_part(tokenizer, add_prefix_space)
    if part is None:
        part = _other_token(tokenizer, listed, [*named, *defaults])
    if part is not None:
        raise ValueError(
            f"its {part} is not that of the Qwen2Tokenizer with add_prefix_space "
            f"{shown(add_prefix_space)} that transformers would make; it would use tokenizer.json "
            'as it is if tokenizer_config.json had the tokenizer_class "TokenizersBackend"'
        )


def _other_part(tokenizer: tokenizers.Tokenizer, add_prefix_space: bool) -> str | None:
    if not isinstance(tokenizer.model, models.BPE):
        return "model"
    for key, served in _QWEN2_MODEL.items():
        if getattr(tokenizer.model, key) not in served:
            return f"model.{key}"
    split = pre_tokenizers.Split(tokenizers.Regex(_QWEN2_REGEX), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False)
    if _state(tokenizer.normalizer) != _state(normalizers.NFC()):
        return "normalizer"
    if _state(tokenizer.pre_tokenizer) != _state(pre_tokenizers.Sequence([split, to_bytes])):
        return "pre_tokenizer"
    # Its settings change no text.
    return None if isinstance(tokenizer.decoder, decoders.ByteLevel) else "decoder"


def _state(part: Any) -> Any:
    """What a part was made with, but for what changes positions in the text alone."""
    state = None if part is None else json.loads(part.__getstate__())
    for each in (state or {}).get("pretokenizers", []):
        each.pop("trim_offsets", None)
    return state


def _other_token(
    tokenizer: tokenizers.Tokenizer, listed: Mapping[int, AddedToken], named: Iterable[str]
) -> str | None:
    rebuilt = tokenizers.Tokenizer(tokenizer.model)
    rebuilt.add_tokens([listed[index] for index in sorted(listed)])
    rebuilt.add_tokens([AddedToken(content, special=True) for content in named])
    ours, theirs = (each.get_added_tokens_decoder() for each in (tokenizer, rebuilt))
    for index in sorted(ours.keys() | theirs.keys()):
        if repr(ours.get(index)) != repr(theirs.get(index)):  # with every flag
            return f"added token {shown((ours.get(index) or theirs[index]).content)}"
    return None
