"""Every key of generation_config.json that changes greedy tokens is honoured or refused by name.

transformers is the judge. Where it cannot generate there is nothing to agree with.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, Qwen3MoeForCausalLM

from janus_server.errors import CheckpointError
from janus_server.model.checkpoint import Checkpoint
from tests.conftest import CheckpointFactory
from tests.fakes.checkpoints import reference_decode, reference_model

PROMPT = [5, 6, 7, 8, 9, 5, 6, 7]
NUM_NEW = 8
ODD_VALUES = [True, 2, [21], [[21]], {"odd": 1}]
HONOURED_OR_A_LIMIT = {"eos_token_id", "max_time"}


@pytest.fixture
def folder(make_checkpoint: CheckpointFactory, tmp_path: Path) -> Path:
    shutil.copytree(make_checkpoint(), tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").unlink()
    return tmp_path / "model"


def generated(model: Qwen3MoeForCausalLM, folder: Path) -> list[int] | None:
    """The most likely tokens, as the folder's generation config has them; None: it fails."""
    ids = torch.tensor([PROMPT])
    try:
        model.generation_config = GenerationConfig.from_pretrained(folder)
        answer = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_NEW,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
    except Exception:
        return None
    token_ids: list[int] = answer.sequences[0, len(PROMPT) :].tolist()
    return token_ids


def refusal_of(folder: Path) -> str | None:
    try:
        Checkpoint.open(folder)
    except CheckpointError as error:
        return str(error)
    return None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_key_is_refused_by_name_or_changes_no_token(folder: Path) -> None:
    model = reference_model(folder)
    expected, _ = reference_decode(model, PROMPT, NUM_NEW)
    (folder / "generation_config.json").write_text("{}")
    assert generated(model, folder) == expected
    wrong = {}
    for key in vars(GenerationConfig()).keys() - HONOURED_OR_A_LIMIT:
        for value in ODD_VALUES:
            (folder / "generation_config.json").write_text(json.dumps({key: value}))
            if (refusal := refusal_of(folder)) is not None:
                if key not in refusal:
                    wrong[key, json.dumps(value)] = refusal
            elif (token_ids := generated(model, folder)) not in (None, expected):
                wrong[key, json.dumps(value)] = str(token_ids)
    assert wrong == {}


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("repetition_penalty", 1.05, "repetition_penalty 1.05 is not served, only 1"),
        ("suppress_tokens", [3], r"suppress_tokens \[3\] is not served, only \[\]"),
        ("num_beams", 4, "num_beams 4 is not served, only 1"),
        ("forced_eos_token_id", 0, "forced_eos_token_id 0 is not served$"),
    ],
)
def test_what_steers_greedy_decoding_is_refused(
    folder: Path, key: str, value: object, sentence: str
) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps({key: value}))
    with pytest.raises(CheckpointError, match=f"^{path} is unusable: {sentence}"):
        Checkpoint.open(folder)


def test_config_json_steers_only_without_a_generation_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"repetition_penalty": 2.0}))
    with pytest.raises(CheckpointError, match=r"config\.json is unusable: repetition_penalty 2\.0"):
        Checkpoint.open(folder)
    (folder / "generation_config.json").write_text("{}")
    Checkpoint.open(folder)


def test_defaults_of_what_a_request_says_are_served(folder: Path) -> None:
    defaults = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_length": 9}
    neutral = {"repetition_penalty": 1.0, "num_beams": 1, "suppress_tokens": None}
    (folder / "generation_config.json").write_text(json.dumps(defaults | neutral))
    Checkpoint.open(folder)
