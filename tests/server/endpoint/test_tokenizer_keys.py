"""Every key of the tokenizer's files that changes ids or text is honoured or refused by name.

transformers is the judge on the very same folder. Where it cannot load the folder there is nothing
to agree with, and nothing is asked.
"""

import copy
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer, TokenizersBackend
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from janus_server.endpoint.tokenizer import Detokenizer
from janus_server.endpoint.tokenizer_file import read_tokenizer
from janus_server.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("quiet_transformers")

TEXTS = [
    "",
    " ",
    "  two spaces at the front and at the end  ",
    "Hello, world! It's 12345 o'clock; we'LL see .\n\n\ttabs\r\n and 3.14 , it 's odd ?",
    "nai\u0308ve cafe\u0301 \u1e9b\u0323 \uac01 \u1100\u1161\u11a8 naïve café",
    "東京タワー、中文。 한국어 नमस्ते",
    "🦁👩‍👩‍👧‍👦 🏳️‍🌈",
    "<|im_start|>user\nWhat?<|im_end|>\n<think> so </think><|endoftext|>",
    "a <|im_start|> b<|im_end|>c  <think>  odd [PAD]<|pad|>",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ODD_VALUES = [None, True, False, 12, "odd", "<|im_end|>", "<think>", [], ["odd"], {"odd": "odd"}]
MORE_ODD_VALUES = [
    {"content": "<|im_end|>", "lstrip": True, "rstrip": True},
    {"__type": "AddedToken", "content": "<|im_end|>", "lstrip": True, "rstrip": True},
    {"__type": "AddedToken", "content": "odd"},
    {"AutoTokenizer": ["odd.Odd", "odd.Odd"]},
    {"300": {"content": "odd", "special": True}},
    {"pad_id": 0, "pad_token": "odd"},
    ["tokenizer.json", "tokenizer.1.0.0.json"],
]
CLASSES = ["Qwen2Tokenizer", "TokenizersBackend"]


def trained() -> Tokenizer:
    """A small tokenizer that is made as the one of the Qwen3 checkpoints is."""
    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix=""))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False)
    tokenizer.train_from_iterator(
        [text for text in TEXTS * 3 if "<" not in text],
        trainers.BpeTrainer(
            vocab_size=400,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    return tokenizer


TRAINED: dict[str, Any] = json.loads(trained().to_str())
CONFIG: dict[str, Any] = {
    "add_bos_token": False,
    "add_prefix_space": False,
    "added_tokens_decoder": {
        str(token["id"]): {key: token[key] for key in token if key != "id"}
        for token in TRAINED["added_tokens"]
    },
    "additional_special_tokens": SPECIAL[1:],
    "bos_token": None,
    "chat_template": "{{ messages }}",
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|im_end|>",
    "errors": "replace",
    "model_max_length": 131072,
    "pad_token": "<|endoftext|>",
    "split_special_tokens": False,
    "tokenizer_class": "Qwen2Tokenizer",
    "unk_token": None,
}
"""As the Qwen3 checkpoints have it."""
WITHOUT_LIST = {key: CONFIG[key] for key in CONFIG if key != "added_tokens_decoder"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, "config.json", {"model_type": "qwen3_moe"})
    write(tmp_path, "tokenizer.json", TRAINED)
    write(tmp_path, "tokenizer_config.json", CONFIG)
    return tmp_path


def write(folder: Path, name: str, content: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(content))


def disagreement(folder: Path, key: str) -> str | None:
    """What is wrong with how we take a folder, None where nothing is."""
    try:
        ours = read_tokenizer(folder / "tokenizer.json")
    except CheckpointError as error:
        # Long keys are cut.
        return None if key[:50] in str(error) else f"refused without its name: {error}"
    try:
        theirs = AutoTokenizer.from_pretrained(folder)
        expected = [theirs(text).input_ids for text in TEXTS]
        texts = [theirs.decode(ids, skip_special_tokens=True) for ids in expected]
    except Exception:
        return None
    for text, ids, decoded in zip(TEXTS, expected, texts, strict=True):
        if (made := ours.encode(text).ids) != ids:
            return f"{text!r} is {made} and {ids}"
        if (shown := ours.decode(ids)) != decoded:
            return f"{ids} are {shown!r} and {decoded!r}"
        detokenizer = Detokenizer(ours)
        pieces = [*(detokenizer.feed([token_id]) for token_id in ids), detokenizer.finish()]
        if (streamed := "".join(pieces)) != decoded:
            return f"{ids} are streamed as {streamed!r}, not {decoded!r}"
    return None


def assert_served(folder: Path) -> None:
    read_tokenizer(folder / "tokenizer.json")
    AutoTokenizer.from_pretrained(folder)
    assert disagreement(folder, "") is None


def keys_that_transformers_reads() -> set[str]:
    """Every word that its code has in quotation marks, and what it can be given as an argument."""
    makers: list[Callable[..., Any]] = [
        AutoTokenizer.from_pretrained,
        PreTrainedTokenizerBase.from_pretrained,
        PreTrainedTokenizerBase._from_pretrained,
        PreTrainedTokenizerBase.__init__,
        TokenizersBackend.convert_to_native_format,
        TokenizersBackend.__init__,
        TokenizersBackend._patch_mistral_regex,
        TokenizersBackend._decode,
        Qwen2Tokenizer.__init__,
    ]
    found = {*CONFIG, *PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES, "image_token"}
    for maker in makers:
        found |= set(re.findall(r'"(\w+)"', inspect.getsource(maker)))
        found |= set(inspect.signature(maker).parameters)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("value", [*ODD_VALUES, *MORE_ODD_VALUES], ids=repr)
@pytest.mark.parametrize("without", [None, "added_tokens_decoder"])
def test_every_key_is_honoured_or_refused_by_name(
    folder: Path, value: object, name: str, without: str | None
) -> None:
    keys = keys_that_transformers_reads()
    assert {"fast_tokenizer_files", "auto_map", "add_prefix_space", "tokenizer_padding"} <= keys
    config = {key: CONFIG[key] for key in CONFIG if key != without}
    wrong = {}
    for key in sorted(keys):
        write(folder, "tokenizer_config.json", config | {"tokenizer_class": name, key: value})
        if (what := disagreement(folder, key)) is not None:
            wrong[key] = what
    assert wrong == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("value", [*ODD_VALUES, *MORE_ODD_VALUES], ids=repr)
def test_every_key_of_special_tokens_map(folder: Path, value: object, name: str) -> None:
    write(folder, "tokenizer_config.json", WITHOUT_LIST | {"tokenizer_class": name})
    wrong = {}
    for key in sorted(keys_that_transformers_reads()):
        write(folder, "special_tokens_map.json", {key: value})
        if (what := disagreement(folder, key)) is not None:
            wrong[key] = what
    assert wrong == {}


@pytest.mark.slow
@pytest.mark.parametrize("value", ODD_VALUES, ids=repr)
def test_every_key_of_config(folder: Path, value: object) -> None:
    write(folder, "tokenizer_config.json", WITHOUT_LIST | {"tokenizer_class": None})
    wrong = {}
    for key in sorted(keys_that_transformers_reads() - {"model_type"}):
        write(folder, "config.json", {"model_type": "qwen3_moe", key: value})
        if (what := disagreement(folder, key)) is not None:
            wrong[key] = what
    assert wrong == {}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"pre_tokenizer": None, "decoder": None}], ids=str)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_every_class(folder: Path, name: str, changes: dict[str, Any]) -> None:
    write(folder, "tokenizer.json", TRAINED | changes)
    names = {name for name in TOKENIZER_MAPPING_NAMES.values() if name is not None}
    names |= {each.removesuffix("Fast") + "Fast" for each in names}
    names |= {"PreTrainedTokenizerFast", "PreTrainedTokenizer", "Odd", ""}
    wrong = {}
    for each in sorted(names):
        write(folder, "tokenizer_config.json", CONFIG | {"tokenizer_class": None})
        content = {"model_type": "qwen3_moe"} if name == "config.json" else CONFIG
        write(folder, name, content | {"tokenizer_class": each})
        if (what := disagreement(folder, "tokenizer_class")) is not None:
            wrong[each] = what
    assert wrong == {}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DECODER = BYTE_LEVEL | {"trim_offsets": True}
SPLIT, TO_BYTES = TRAINED["pre_tokenizer"]["pretokenizers"]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
CUT = {"type": "Replace", "pattern": {"String": "ha"}, "content": "0"}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
OTHER_PARTS: list[tuple[str, Any]] = [
    *(("normalizer", part) for part in (None, {"type": "NFKC"}, {"type": "Lowercase"})),
    ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}),
    ("normalizer", {"type": "Prepend", "prepend": "a"}),
    *(("pre_tokenizer", part) for part in (None, DECODER, METASPACE)),
    ("pre_tokenizer.pretokenizers", [SPLIT]),
    ("pre_tokenizer.pretokenizers", [{"type": "Digits", "individual_digits": True}, TO_BYTES]),
    ("pre_tokenizer.pretokenizers", [SPLIT | {"pattern": {"String": " "}}, TO_BYTES]),
    ("pre_tokenizer.pretokenizers", [SPLIT | {"pattern": {"Regex": r"\p{N}{1,3}"}}, TO_BYTES]),
    ("pre_tokenizer.pretokenizers", [SPLIT | {"behavior": "Removed"}, TO_BYTES]),
    ("pre_tokenizer.pretokenizers", [SPLIT | {"invert": True}, TO_BYTES]),
    ("pre_tokenizer.pretokenizers", [SPLIT, TO_BYTES | {"add_prefix_space": True}]),
    ("pre_tokenizer.pretokenizers", [SPLIT, TO_BYTES | {"use_regex": True}]),
    *(("decoder", part) for part in (None, {"type": "Fuse"}, METASPACE)),
    ("decoder", {"type": "Sequence", "decoders": [DECODER, {"type": "Fuse"}]}),
    ("decoder", {"type": "BPEDecoder", "suffix": "e"}),
    ("decoder", {"type": "Sequence", "decoders": [{"type": "Fuse"}, STRIP | {"stop": 1}]}),
    ("decoder", {"type": "Sequence", "decoders": [DECODER, CUT]}),
    ("decoder", {"type": "Sequence", "decoders": [CUT, {"type": "Fuse"}, STRIP]}),
    ("model.dropout", 0.5),
    ("model.unk_token", "a"),
    ("model.continuing_subword_prefix", "a"),
    ("model.end_of_word_suffix", "a"),
    ("model.fuse_unk", True),
    ("model.byte_fallback", True),
    ("model.ignore_merges", True),
    ("model.merges", []),
    ("model", {"type": "WordLevel", "unk_token": "a", "vocab": TRAINED["model"]["vocab"]}),
    (
        "model",
        {
            "type": "WordPiece",
            "unk_token": "a",
            "vocab": TRAINED["model"]["vocab"],
            "continuing_subword_prefix": "",
            "max_input_chars_per_word": 100,
        },
    ),
    (
        "model",
        {
            "type": "Unigram",
            "unk_id": 0,
            "vocab": [[token, -1.0] for token in TRAINED["model"]["vocab"]],
            "byte_fallback": False,
        },
    ),
    ("added_tokens", []),
    ("added_tokens", TRAINED["added_tokens"][::-1]),
    ("added_tokens", TRAINED["added_tokens"][1:]),
    ("added_tokens", [token | {"id": token["id"] + 9} for token in TRAINED["added_tokens"]]),
    ("added_tokens", [token | {"content": "odd"} for token in TRAINED["added_tokens"]]),
    *(
        ("added_tokens", [token | {flag: True} for token in TRAINED["added_tokens"]])
        for flag in ("lstrip", "rstrip", "single_word", "normalized", "special")
    ),
    ("added_tokens", [*TRAINED["added_tokens"], TRAINED["added_tokens"][0] | {"lstrip": True}]),
    ("added_tokens", [*TRAINED["added_tokens"], TRAINED["added_tokens"][0] | {"content": "odd"}]),
    (
        "added_tokens",
        [*TRAINED["added_tokens"], TRAINED["added_tokens"][3] | {"id": 404, "content": "odd"}],
    ),
]
SAME_PARTS: list[tuple[str, Any]] = [
    ("decoder", DECODER),
    ("decoder", DECODER | {"trim_offsets": False, "add_prefix_space": True}),
    ("pre_tokenizer.pretokenizers", [SPLIT, TO_BYTES | {"trim_offsets": True}]),
    ("post_processor", None),
    ("post_processor", DECODER | {"add_prefix_space": True}),
    (
        "post_processor",
        {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {
                "<|im_start|>": {
                    "id": "<|im_start|>",
                    "ids": [TRAINED["added_tokens"][1]["id"]],
                    "tokens": ["<|im_start|>"],
                }
            },
        },
    ),
    (
        "truncation",
        {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
    ),
    (
        "padding",
        {
            "strategy": {"Fixed": 99},
            "direction": "Left",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<|im_end|>",
        },
    ),
    ("model.continuing_subword_prefix", None),
    ("model.dropout", 0.0),
]


def write_with(folder: Path, path: str, value: Any) -> None:
    content = copy.deepcopy(TRAINED)
    *parents, key = path.split(".")
    parent = content
    for name in parents:
        parent = parent[name]
    parent[key] = value
    write(folder, "tokenizer.json", content)


@pytest.mark.parametrize("config", [CONFIG, WITHOUT_LIST], ids=["list", "no list"])
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(("path", "value"), OTHER_PARTS)
def test_a_part_of_tokenizer_json_that_is_other(
    folder: Path, path: str, value: Any, name: str, config: dict[str, Any]
) -> None:
    write(folder, "tokenizer_config.json", config | {"tokenizer_class": name})
    write_with(folder, path, value)
    key = 'token "' if path == "added_tokens" else path.removesuffix(".pretokenizers")
    assert disagreement(folder, key) is None


@pytest.mark.parametrize("name", [*CLASSES, None, "Qwen2TokenizerFast", "LlamaTokenizerFast"])
@pytest.mark.parametrize(("path", "value"), SAME_PARTS)
def test_a_part_of_tokenizer_json_that_changes_no_text(
    folder: Path, path: str, value: Any, name: str | None
) -> None:
    write(folder, "tokenizer_config.json", CONFIG | {"tokenizer_class": name})
    write_with(folder, path, value)
    assert_served(folder)


def flags(content: str) -> dict[str, object]:
    return {"content": content, **dict.fromkeys(["lstrip", "normalized", "rstrip"], False)}


MORE_FILES: dict[str, dict[str, Any]] = {
    "special_tokens_map.json": {
        "additional_special_tokens": SPECIAL[1:],
        "eos_token": flags("<|im_end|>"),
        "pad_token": flags("<|endoftext|>"),
    },
    "added_tokens.json": {token["content"]: token["id"] for token in TRAINED["added_tokens"]},
    "vocab.json": {"other": 0},
    "tekken.json": {},
}


@pytest.mark.parametrize("config", [CONFIG, WITHOUT_LIST, {}], ids=["list", "no list", "nothing"])
def test_the_files_that_checkpoints_have(folder: Path, config: dict[str, Any]) -> None:
    write(folder, "tokenizer_config.json", config)
    for name, content in MORE_FILES.items():
        write(folder, name, content)
    assert_served(folder)


@pytest.mark.parametrize("name", CLASSES)
def test_what_transformers_saves(folder: Path, name: str) -> None:
    write(folder, "tokenizer_config.json", CONFIG | {"tokenizer_class": name})
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    assert_served(folder)


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        (
            "tokenizer_config.json",
            {"tokenizer_class": "GPT2Tokenizer"},
            'its tokenizer_class is "GPT2Tokenizer"; served are TokenizersBackend, Pre',
        ),
        (
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["odd.Odd", None]}},
            'its auto_map names code of its own, \\["odd.Odd", null\\]',
        ),
        (
            "tokenizer_config.json",
            {"fast_tokenizer_files": ["tokenizer.4.json"]},
            'it has fast_tokenizer_files \\["tokenizer.4.json"\\]',
        ),
        ("special_tokens_map.json", {"add_eos_token": True}, 'it has the key "add_eos_token"'),
        ("special_tokens_map.json", {"eos_token": "<think>"}, 'eos_token names the token "<thi'),
        ("added_tokens.json", {"<think>": 3}, 'its token "<think>" has id 3, and .* has 403$'),
        ("config.json", {"tokenizer_class": "Odd"}, 'its tokenizer_class is "Odd"; served are'),
    ],
)
def test_what_is_not_served_is_named(
    folder: Path, name: str, changes: dict[str, Any], sentence: str
) -> None:
    path = folder / name
    write(folder, "tokenizer_config.json", WITHOUT_LIST | {"tokenizer_class": None})
    write(folder, name, (json.loads(path.read_text()) if path.exists() else {}) | changes)
    with pytest.raises(CheckpointError, match=f"^{path} is not served: {sentence}"):
        read_tokenizer(folder / "tokenizer.json")


@pytest.mark.parametrize("class_of_config", [None, "Qwen2Tokenizer"])
def test_tokenizer_json_alone_is_used_as_it_is_with_a_warning(
    folder: Path, class_of_config: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "tokenizer_config.json").unlink()
    write(folder, "config.json", {"tokenizer_class": class_of_config})
    read_tokenizer(folder / "tokenizer.json")
    assert caplog.messages == []
    write_with(folder, "normalizer", {"type": "Lowercase"})
    sentence = "its normalizer is not that of the Qwen2Tokenizer"
    if class_of_config is not None:
        with pytest.raises(CheckpointError, match=sentence):
            read_tokenizer(folder / "tokenizer.json")
        return
    ours = read_tokenizer(folder / "tokenizer.json")
    assert ours.encode("AbC").ids == ours.encode("abc").ids
    assert [sentence in message for message in caplog.messages] == [True]


def test_the_space_in_front_must_be_that_of_tokenizer_json(folder: Path) -> None:
    write(folder, "tokenizer_config.json", CONFIG | {"add_prefix_space": True})
    sentence = "its pre_tokenizer is not that of the Qwen2Tokenizer with add_prefix_space true that"
    with pytest.raises(CheckpointError, match=sentence):
        read_tokenizer(folder / "tokenizer.json")
    write_with(
        folder, "pre_tokenizer.pretokenizers", [SPLIT, TO_BYTES | {"add_prefix_space": True}]
    )
    assert_served(folder)


def test_tokens_that_no_file_names_have_a_default(folder: Path) -> None:
    write(folder, "tokenizer_config.json", {"unk_token": None, "pad_token": None})
    write(folder, "tokenizer.json", TRAINED | {"added_tokens": []})
    with pytest.raises(CheckpointError, match=r'its added token "<.endoftext.>" is not that of'):
        read_tokenizer(folder / "tokenizer.json")
    names: dict[str, Any] = {"unk_token": None, "pad_token": None, "eos_token": None}
    write(folder, "tokenizer_config.json", names)
    assert_served(folder)


def test_a_model_name_that_can_undo_the_class(folder: Path) -> None:
    write(folder, "tokenizer_config.json", CONFIG | {"tokenizer_class": "TokenizersBackend"})
    write(folder, "config.json", {"model_type": "qwen3_moe", "model_name": "qwen2"})
    with pytest.raises(CheckpointError, match='with the model_name "qwen2" of config'):
        read_tokenizer(folder / "tokenizer.json")
    write(folder, "config.json", {"model_type": "qwen3_moe", "model_name": "someone/qwen3"})
    assert_served(folder)
