"""Token ids are those of transformers on the same folder, or the folder is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from janus_server.endpoint.tokenizer import load_tokenizer
from janus_server.endpoint.tokenizer_file import checked_tokenizer, read_tokenizer
from janus_server.errors import CheckpointError
from janus_server.model.checkpoint import Checkpoint
from tests.conftest import CheckpointFactory
from tests.fakes.checkpoints import save_tokenizer

pytestmark = pytest.mark.usefixtures("quiet_transformers")

TEXT = "Hi  there, naïve 東京\n<|user|> what <s>is</s> <think> 12 <|end|>"
FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}


def library() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        ["there is a naïve what, 東京 12"] * 3,
        trainers.BpeTrainer(
            vocab_size=280,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_special_tokens(["<|user|>", "<|end|>"])
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    return tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    return write(tmp_path, library())


def write(folder: Path, tokenizer: Tokenizer, **config: object) -> Path:
    return save_tokenizer(folder, tokenizer, **config).parent


def assert_same(folder: Path) -> None:
    ours = read_tokenizer(folder / "tokenizer.json").encode(TEXT).ids
    assert ours == AutoTokenizer.from_pretrained(folder)(TEXT).input_ids


def test_settings_of_the_training_neither_cut_nor_fill_a_prompt(folder: Path) -> None:
    tokenizer = library()
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=100, pad_token="<|end|>")
    assert_same(write(folder, tokenizer))


def test_padding_with_a_token_that_is_not_there(folder: Path) -> None:
    tokenizer = library()
    tokenizer.enable_padding(length=100)
    write(folder, tokenizer)
    with pytest.raises(CheckpointError, match=r'tokenizer\.json .* pad_token names .* "\[PAD\]"'):
        read_tokenizer(folder / "tokenizer.json")


@pytest.mark.parametrize("single", ["<|user|> $A", "$A <|end|>", "<|user|> $A <|end|>", "$A"])
def test_tokens_around_a_prompt(folder: Path, single: str) -> None:
    tokenizer = library()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("<|user|>", "<|end|>")],
    )
    assert_same(write(folder, tokenizer))


SAME: list[dict[str, Any]] = [
    {},
    {"bos_token": "<|user|>", "add_bos_token": True},
    {"eos_token": "<|end|>", "add_eos_token": True},
    {"add_prefix_space": True},
    {"split_special_tokens": True},
    {"model_max_length": 4, "truncation_side": "left", "padding_side": "left"},
    {"clean_up_tokenization_spaces": True, "do_lower_case": True},
    {"pad_token": {"__type": "AddedToken", "content": "<|end|>", "lstrip": True}},
    {"additional_special_tokens": ["<|user|>", "<|end|>"]},
    {"added_tokens_decoder": {"280": {"content": "<|user|>", **FLAGS, "special": True}}},
]


@pytest.mark.parametrize("config", SAME, ids=repr)
def test_settings_of_tokenizer_config(folder: Path, config: dict[str, Any]) -> None:
    assert_same(write(folder, library(), **config))


@pytest.mark.parametrize(
    ("name", "content", "token"),
    [
        ("tokenizer_config.json", {"bos_token": "<s>"}, "<s>"),
        ("tokenizer_config.json", {"pad_token": {"content": "is"}}, "is"),
        ("tokenizer_config.json", {"additional_special_tokens": ["<|end|>", "</s>"]}, "</s>"),
        ("tokenizer_config.json", {"extra_special_tokens": {"image_token": "<s>"}}, "<s>"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": {"content": "what"}}}, "what"),
        ("special_tokens_map.json", {"eos_token": "</s>"}, "</s>"),
        ("added_tokens.json", {"<s>": 283}, "<s>"),
    ],
)
def test_tokens_that_tokenizer_json_does_not_have(
    folder: Path, name: str, content: dict[str, object], token: str
) -> None:
    (folder / name).write_text(json.dumps(content))
    if name == "tokenizer_config.json":
        content = {"tokenizer_class": "TokenizersBackend"} | content
        (folder / name).write_text(json.dumps(content))
    sentence = (
        f'{name} is not served: .* the token "{token}", which is not among the .*added tokens'
    )
    with pytest.raises(CheckpointError, match=sentence):
        read_tokenizer(folder / "tokenizer.json")


@pytest.mark.parametrize("flag", FLAGS)
def test_tokens_that_take_other_text_around_them(folder: Path, flag: str) -> None:
    token = {"content": "<|user|>", **FLAGS, flag: True}
    write(folder, library(), added_tokens_decoder={"280": token})
    with pytest.raises(CheckpointError, match=f'its token "<.user.>" has {flag} true, and'):
        read_tokenizer(folder / "tokenizer.json")


@pytest.mark.parametrize("value", [3, True, "x", [3], [None], {"a": 3}, [{}], {"content": 3}])
@pytest.mark.parametrize("key", ["added_tokens_decoder", "extra_special_tokens", "bos_token"])
def test_odd_values_are_refused_with_a_sentence(folder: Path, key: str, value: object) -> None:
    write(folder, library(), **{key: value})
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json is not served: {key} "):
        read_tokenizer(folder / "tokenizer.json")


def test_a_panic_of_the_library_is_a_sentence(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": ""}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="is not a usable tokenizer"):
        read_tokenizer(folder / "tokenizer.json")


def test_the_tokenizer_of_another_model(make_checkpoint: CheckpointFactory) -> None:
    folder = make_checkpoint(vocab_size=64)
    sentence = "is of another model: it makes token ids up to 255, and the model has .* of 64"
    for check in (checked_tokenizer, load_tokenizer):
        with pytest.raises(CheckpointError, match=sentence):
            check(Checkpoint.open(folder))


def test_added_tokens_may_go_beyond_the_vocabulary(make_checkpoint: CheckpointFactory) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(vocab_size=281))
    write(checkpoint.path, library())
    checked_tokenizer(checkpoint)
