import shutil
from pathlib import Path

import pytest

from janus_bench.demo import DEMO_CHECKPOINT, PROMPTS, command
from janus_server.errors import ConfigError
from janus_server.model.checkpoint import Checkpoint
from tests.conftest import CheckpointFactory
from tests.fakes.checkpoints import reference_decode, reference_model
from tests.fakes.decoding import greedy_decode, local_pool
from tests.fakes.serving import run_janus


@pytest.mark.e2e
def test_the_demo_streams_every_prompt_and_ends() -> None:
    result = run_janus("demo", "--max-tokens", "12", "--temperature", "0")
    assert result.returncode == 0, result.stderr
    for index in range(len(PROMPTS)):
        assert f"[{index + 1}] " in result.stdout
    assert "TTFT ms" in result.stdout
    assert "activated experts" in result.stdout
    assert result.stdout.rstrip().endswith("all processes have ended")


def test_nothing_starts_on_what_it_cannot_stream(
    make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"--max-tokens must be less than .* of 1024, not 1024"):
        command(["--max-tokens", "1024"])
    folder = Path(shutil.copytree(make_checkpoint(), tmp_path / "model"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        command(["--checkpoint", str(folder)])


def test_the_demo_checkpoint_gives_the_tokens_of_transformers() -> None:
    spec = Checkpoint.open(DEMO_CHECKPOINT).spec
    assert (spec.num_experts, spec.top_k) == (32, 4)
    assert spec.eos_token_ids
    prompts = [[17, 300, 5], list(range(40, 90))]
    decoded = greedy_decode(DEMO_CHECKPOINT, local_pool(DEMO_CHECKPOINT, 2), prompts, 16)
    model = reference_model(DEMO_CHECKPOINT)
    for prompt, ours in zip(prompts, decoded, strict=True):
        assert ours.token_ids == reference_decode(model, prompt, 16)[0]
